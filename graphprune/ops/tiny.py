"""A graph of one op with sample operands, of which every slice has an id: see ``check``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.errors import OpError
from graphprune.ops.calls import Args, Function, Kwargs, target_of
from graphprune.ops.given import Number, meant
from graphprune.ops.ids import Shape, Ties, along, varying
from graphprune.ops.registry import Op
from graphprune.ops.samples import Random, Sample
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk


def overload_of(name: str, sample: Sample) -> object:
    """The overload that takes the arguments of a sample.

    Raises:
        OpError: there is no such op, or it does not run on them.
    """
    space, _, own = name.partition(".")
    packet = getattr(getattr(torch.ops, space), own, None)
    errors = []
    for overload in packet.overloads() if packet is not None else ():
        target = getattr(packet, overload)
        try:
            run(target, *sample.made())
        except (RuntimeError, TypeError, NotImplementedError, IndexError) as error:
            errors.append(str(error).splitlines()[0])
        else:
            return target
    raise OpError(f"{name} does not run on its sample: {errors[0] if errors else 'not loaded'}")


def run(target: Function, args: Sequence[Any], kwargs: Kwargs) -> list[Any]:
    """The results of an op on copies of its arguments."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    out = target(*args, **kwargs)
    return list(out) if isinstance(out, list | tuple) else [out]


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors agree up to rounding."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    tolerance = 1e-5 if found.dtype is torch.float32 else 1e-10
    return torch.allclose(found, wanted, tolerance, tolerance, equal_nan=True)


class Tiny:
    """One op on a sample, and what its rule for channels says.

    Args:
        target: the overload.
        op: what is declared of it.
        sample: every random tensor of it has ids in all dimensions; others have none.
        constant: whether the random tensors are parameters, or activations.
    """

    def __init__(self, target: Any, op: Op, sample: Sample, constant: bool) -> None:
        self.target, self.op, self.sample, self.constant = target, op, sample, constant
        self.args, self.kwargs = sample.made()
        tags = getattr(target, "tags", ())
        self.random = torch.Tag.nondeterministic_seeded in tags or "empty" in target._schema.name
        self.graph, self.ties = fx.Graph(), Ties()
        self.tensors: dict[fx.Node, Tensor] = {}
        self.walk = Walk(self.ties, lambda name: None)
        drawn = iter([isinstance(part, Random) for part in sample.leaves if _is_tensor(part)])
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda tensor: self._operand(tensor, next(drawn)), (self.args, self.kwargs)
        )
        self.walk.first_fresh = self.ties.size
        self.walk.marks.written = [i for value in self.walk.values.values() for i in value.layers]
        self.node = self.graph.call_function(target, tuple(args), kwargs)
        self.outputs = self._results(run(target, self.args, self.kwargs))
        self.walk.apply(self.node)
        self.walk.finish()

    def _operand(self, tensor: Tensor, channels: bool) -> fx.Node:
        node = self.graph.create_node("get_attr", f"operand_{len(self.tensors)}")
        _describe(node, tensor)
        layers = tuple(
            along(self.ties.fresh(size), dim, tensor.dim())
            for dim, size in enumerate(tensor.shape if channels else ())
            if size > 1
        )
        constant = self.constant or not channels
        self.walk.values[node] = Value(
            tuple(tensor.shape), layers, constant, linear=self.constant and channels
        )
        self.tensors[node] = tensor
        return node

    def _results(self, out: list[object]) -> list[fx.Node | None]:
        """The nodes of the results, which something reads."""
        numbers = list(_numbers(self.node, self.sample.args, self.sample.kwargs))
        self.node.meta.update(numbers=numbers, module="", line=None)
        if len(out) == 1 and isinstance(out[0], Tensor) and not _lists(self.target):
            _describe(self.node, out[0])
            self.graph.output(self.node)
            return [self.node]
        items: dict[int, fx.Node] = {}
        for index, item in enumerate(out):
            if isinstance(item, Tensor):
                items[index] = self.graph.call_function(operator.getitem, (self.node, index))
                _describe(items[index], item)
        self.node.meta["items"] = items
        self.graph.output(next(iter(items.values()), None))
        return [items.get(index) for index in range(len(out))]

    def resolved(self, way: int) -> tuple[np.ndarray, np.ndarray]:
        """The component of every id, and which of them stay, when choices are taken one way."""
        ties = Ties(self.ties.size, [*self.ties.left], [*self.ties.right], [*self.ties.frozen])
        for choice in self.walk.marks.choices:
            taken = choice.ways[min(way, len(choice.ways) - 1)]
            for a, b in taken.ties:
                ties.tie(a, b)
            for ids in taken.frozen:
                ties.freeze(ids, None)
        for first, layer in self.walk.marks.aligned:
            ties.tie(first, layer)
        grids = [layer for layer, _ in self.walk.marks.grids]
        grids += [i for value in self.walk.values.values() for i in value.layers]
        for grid in grids:  # rows leave
            ties.collapse(grid, sorted(varying(grid))[1:])
        labels = ties.components()
        stays = np.zeros(int(labels.max()) + 1, bool)
        stays[labels[0]] = True
        for ids, _ in ties.frozen:
            stays[labels[ids.numpy()]] = True
        return labels, stays

    def removals(self, way: int, most: int) -> Iterator[np.ndarray]:
        """For units that can leave, and for two of them together, which ids are alive."""
        labels, stays = self.resolved(way)
        own = np.unique(labels[1 : self.walk.first_fresh])
        units = own[~stays[own]]
        for count in range(min(len(units), most)):
            yield labels != units[count]
        if len(units) > 2:
            yield ~np.isin(labels, units[[0, -1]])

    def cut(self, alive: np.ndarray) -> Cut:
        """What a removal leaves."""
        return Cut(self, alive)


class Cut:
    """A sample of which some ids left; answers what rules for given sizes ask."""

    def __init__(self, tiny: Tiny, alive: np.ndarray) -> None:
        self.tiny, self.alive = tiny, alive

    @property
    def text(self) -> str:
        """Which slices of the operands left."""
        parts = []
        for number, (node, tensor) in enumerate(self.tiny.tensors.items()):
            for dim in range(tensor.dim()):
                gone = np.flatnonzero(~self.positions(node, dim)).tolist()
                parts += [f"{gone} of dimension {dim} of tensor {number}"] if gone else []
        return ", ".join(parts)

    def mask(self, node: fx.Node) -> Tensor:
        """Which positions of a value stay, broadcast to its shape."""
        keep = torch.ones(self.tiny.walk.values[node].shape, dtype=torch.bool)
        for layer in self.tiny.walk.values[node].layers:
            keep = keep & torch.from_numpy(self.alive[layer.numpy()])
        return keep

    def positions(self, node: fx.Node, dim: int, alive: np.ndarray | None = None) -> np.ndarray:
        """For each position of a value along ``dim`` whether it stays."""
        keep = self.mask(node).movedim(dim, 0)
        found: np.ndarray = keep.reshape(len(keep), -1).any(1).numpy()
        return found

    def shape(self, node: fx.Node, alive: np.ndarray | None = None) -> Shape:
        """The shape of what stays of a value."""
        ndim = self.tiny.walk.values[node].ndim
        return tuple(int(self.positions(node, dim).sum()) for dim in range(ndim))

    def taken(self, node: fx.Node, tensor: Tensor) -> Tensor:
        """What stays of a value.

        Raises:
            ValueError: it is no rectangle.
        """
        for dim in range(tensor.dim()):
            keep = torch.from_numpy(self.positions(node, dim))
            tensor = tensor.index_select(dim, keep.nonzero().flatten())
        if tensor.numel() != int(self.mask(node).sum()):
            raise ValueError("what stays is no rectangle")
        return tensor

    def sliced(self) -> tuple[object, object]:
        """The arguments without what left; sizes that torch takes from them follow."""
        kept = iter([self.taken(node, tensor) for node, tensor in self.tiny.tensors.items()])
        return self.tiny.sample.filled(lambda part: next(kept))

    def reference(self) -> list[Any]:
        """The results for the whole operands, at the positions that stay; zeroes where it sums."""
        tiny = self.tiny
        reads = tiny.walk.marks.sums(tiny.node)

        def zeroed(node: fx.Node, tensor: Tensor) -> Tensor:
            return torch.where(self.mask(node), tensor, tensor.new_zeros(())) if reads else tensor

        args, kwargs = self._mapped(zeroed)
        out: object = NotImplemented
        keep = self.mask(tiny.node.all_input_nodes[0]) if reads else None
        if keep is not None and tiny.op.masked is not None and not keep.all():
            out = tiny.op.masked(keep, *args, **kwargs)
        if out is NotImplemented:
            out = run(tiny.target, args, kwargs)
        out = list(out) if isinstance(out, list | tuple) else [out]
        return [self._result(node, part) for node, part in zip(tiny.outputs, out)]

    def _result(self, node: fx.Node | None, whole: object) -> object:
        if node is None or not isinstance(whole, Tensor):
            return None
        known = self.tiny.walk.values[node]
        if known.layers == () and not node.users:
            return None  # nothing is claimed of results that nothing reads
        try:
            return self.taken(node, whole)
        except (ValueError, RuntimeError, IndexError) as error:
            return ValueError(str(error))

    def _mapped(self, function: Callable[[fx.Node, Tensor], Tensor]) -> tuple[Any, Any]:
        node = self.tiny.node
        return fx.map_arg((node.args, node.kwargs), lambda n: function(n, self.tiny.tensors[n]))


def _describe(node: fx.Node, tensor: Tensor) -> None:
    node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, stride=tensor.stride())


def _lists(target: Any) -> bool:
    """Whether an op returns several tensors."""
    returns = target._schema.returns
    return len(returns) > 1 or "[]" in str(returns[0].type)


def _numbers(node: fx.Node, args: Args, kwargs: Kwargs) -> Iterator[Number]:
    """The ints among arguments, and where they stand."""
    op = target_of(node)
    names = [argument.name for argument in op._schema.arguments]
    pairs = {**dict(zip(names, enumerate(args))), **{k: (k, v) for k, v in kwargs.items()}}
    ndim = len(node.all_input_nodes[0].meta["shape"]) if node.all_input_nodes else 1
    dim = pairs["dim"][1] % max(ndim, 1) if type(pairs.get("dim", (0, None))[1]) is int else 0
    for name, (place, arg) in pairs.items():
        if type(arg) is int:
            yield Number(arg, (place,), *meant(name, 0, dim))
        elif isinstance(arg, list):
            for at, number in enumerate(arg):
                if type(number) is int:
                    yield Number(number, (place, at), *meant(name, at, dim))


def _is_tensor(part: object) -> bool:
    return isinstance(part, Random | Tensor)
