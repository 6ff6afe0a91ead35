"""Follow channels through a model while it runs: ids of channels beside every tensor.

The rules of the ops, which planning applies to a recorded graph, are applied here to each op as it
runs on whatever inputs a model is given. So what stays of a tensor is known at other batch sizes
and resolutions as well, and wherever the code goes for other values.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphprune.channels.slots import integers_in, slots_of
from graphprune.errors import GraphPruneError
from graphprune.ops.calls import FUNCTORCH
from graphprune.ops.ids import Alternatives, Ties, first_along
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk
from graphprune.plan.plan import Plan
from graphprune.record.identity import Identity
from graphprune.record.tensors import held_tensors
from graphprune.verification.calls import Calls

_UNKNOWN, _STAYS, _GONE = 0, 1, 2
_RANK = np.array([1, 2, 0])  # of these, in a row that stands or falls as a whole


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What runs here is none of the model's: no mode sees it."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


class Undecided(GraphPruneError, RuntimeError):
    """What a plan means for a tensor cannot be told; the text says why."""


class Fates:
    """Which ids stay: those of parameters by the plan, those made on the way by what they join."""

    def __init__(self, walk: Walk, plan: Plan, starts: dict[tuple[str, int], int]) -> None:
        self.walk = walk
        self.known = np.full(walk.first_fresh, _STAYS, np.int8)
        for slot in plan.widths:
            start = starts.get((slot.tensor, slot.dim))
            if slot.blocks == 1 and start is not None:  # of blocks, what the weight reads is zeroed
                gone = np.setdiff1d(np.arange(slot.size), slot.kept)
                self.known[start + gone] = _GONE
        self.guessed: set[int] = set()  # ids of no known fate that something depended on
        self.clash = ""  # where ids that join have different fates: the plan means something else
        self.version = 0  # how often more became known
        self._open: list[tuple[np.ndarray, np.ndarray]] = []  # ties between ids of no known fate
        self._ties = self._choices = self._frozen = 0

    def stays(self, layer: Tensor) -> np.ndarray:
        """For every position of a layer whether it stays."""
        ids = layer.numpy()
        if ids.size and int(ids.max()) >= self.walk.first_fresh:
            self.update()
            fates = self.known[ids]
            self.guessed.update(ids[fates == _UNKNOWN].tolist())
            return fates != _GONE
        found: np.ndarray = self.known[ids] != _GONE
        return found

    def any_gone(self, layer: Tensor) -> bool:
        """Whether any of the ids of a layer is known to leave."""
        return bool((self._known(layer) == _GONE).any())

    def row(self, layer: Tensor, dims: Iterable[int]) -> Tensor:
        """What stands for a layer along some dimensions: what stays of it, if anything does.

        Of a grid that several plans cut both ways, the first row or column may have left while
        others stay.
        """
        dims = [dim for dim in dims if layer.shape[dim] > 1]
        first = first_along(layer, dims)
        if not dims or bool((self._known(first) == _STAYS).all()):
            return first
        kept = [dim for dim in range(layer.dim()) if dim not in dims]
        ids = layer.permute(*kept, *dims).flatten(len(kept))
        best = torch.from_numpy(_RANK[self._known(ids)]).argmax(-1, keepdim=True)
        return ids.gather(-1, best).reshape(first.shape)

    def _known(self, layer: Tensor) -> np.ndarray:
        """What is known of the ids of a layer."""
        ids = layer.numpy()
        if ids.size and int(ids.max()) >= self.walk.first_fresh:
            self.update()
        known: np.ndarray = self.known[ids]
        return known

    def gone(self, ids: Tensor) -> np.ndarray:
        """Those ids of parameters that leave."""
        found = ids.reshape(-1).numpy()
        found = found[found < self.walk.first_fresh]
        left: np.ndarray = found[self.known[found] == _GONE]
        return left

    def update(self) -> None:
        """Take in what was tied since the last time."""
        ties = self.walk.ties
        if ties.size > len(self.known):
            more = np.zeros(ties.size - len(self.known), np.int8)
            self.known = np.concatenate([self.known, more])
        for left, right in zip(ties.left[self._ties :], ties.right[self._ties :]):
            self._open.append((left.numpy().reshape(-1), right.numpy().reshape(-1)))
        self._ties = len(ties.left)
        for ids, reason in ties.frozen[self._frozen :]:
            if not self.clash and bool((self.known[ids.numpy()] == _GONE).any()):
                self.clash = str(reason)
        self._frozen = len(ties.frozen)
        for choice in self.walk.marks.choices[self._choices :]:
            self._open += self._way(choice)
        self._choices = len(self.walk.marks.choices)
        while self._spread():
            pass

    def _spread(self) -> bool:
        """Hand fates on along ties; whether any was handed on."""
        if not self._open:
            return False
        left, right = (np.concatenate(ids) for ids in zip(*self._open))
        a, b = self.known[left], self.known[right]
        changed = False
        for ids, mine, other in ((left, a, b), (right, b, a)):
            found = (mine == _UNKNOWN) & (other != _UNKNOWN)
            if found.any():
                changed = True
                self.known[ids[found]] = other[found]
        a, b = self.known[left], self.known[right]
        if not self.clash and bool(((a != b) & (a > 0) & (b > 0)).any()):
            self.clash = "channels that stay meet channels that leave"
        self.version += changed
        still = (a == _UNKNOWN) | (b == _UNKNOWN)
        self._open = [(left[still], right[still])] if still.any() else []
        return changed

    def _way(self, choice: Alternatives) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ties of the way to keep a grid rectangular that the plan has gone."""
        for way in choice.ways:
            flat = [
                tuple(t.reshape(-1).numpy() for t in torch.broadcast_tensors(*p)) for p in way.ties
            ]
            fates = [(self.known[left], self.known[right]) for left, right in flat]
            if all(((a == b) | (a == _UNKNOWN) | (b == _UNKNOWN)).all() for a, b in fates):
                return [(left, right) for left, right in flat]
        return []  # several plans in a row went several ways

    def settled(self) -> bool:
        """Whether all that was guessed on the way turned out as guessed: these ids stay."""
        self.update()
        wrong = {number for number in self.guessed if self.known[number] == _GONE}
        self.guessed -= wrong
        return not wrong


class Follower:
    """Nodes of a graph, and with them the ids of channels, for the tensors of a running model.

    What it has found of a call serves later runs as well.

    Args:
        module: the model that runs.
        plan: which of its channels stay.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        ties = Ties()
        slots, values = slots_of(module, ties)
        numbers = integers_in(held_tensors(module))
        attention = plan.request.get("attention", "heads")
        self.walk = Walk(
            ties,
            lambda name: moving.get(name),
            attention,
            numbers.get,
            by_blocks=self._by_blocks,
            row=lambda layer, dims: self.fates.row(layer, dims),
            leaves=lambda layer: self.fates.any_gone(layer),
        )
        starts = {(slot.tensor, slot.dim): slot.start for slot in slots}
        self.fates = Fates(self.walk, plan, starts)
        moving = {name: self._moving(value) for name, value in values.items()}
        self.plain = plan.plain_statistics  # statistics of the masked values themselves
        self.careful = False  # whether functions are taken apart before they run
        self.graph = fx.Graph()
        self.calls = Calls(self.walk.values)
        self.count = 0
        self.identity = Identity()
        self._objects: dict[int, tuple[Any, ...]] = {}  # tensors as they were when they were put
        self._masks: dict[fx.Node, Tensor | None] = {}
        self._masks_of = 0  # the version of fates that they are of
        self._parameters: dict[str, fx.Node] = {}
        self._constants: list[fx.Node] = []
        self._waiting: list[tuple[Any, ...]] = []  # known, but not yet by the place of their values

    def _moving(self, value: Value) -> Value:
        """A parameter with ids in the dimensions from which some leave."""
        gone = [layer for layer in value.layers if not self.fates.stays(layer).all()]
        return replace(value, layers=tuple(gone))

    def _by_blocks(self, node: fx.Node, layer: Tensor, dim: int) -> bool:
        """Whether a grid was cut along a dimension."""
        stays = self.fates.stays(layer)
        return bool((stays != stays.take([0], axis=dim)).any())

    def start(self, module: nn.Module, inputs: Iterable[Tensor]) -> None:
        """A run begins."""
        self.identity = Identity()
        self._objects.clear()
        self._waiting.clear()
        if self._masks_of != self.fates.version:
            self._masks.clear()
            self._masks_of = self.fates.version
        for node in self._constants:  # of the last run: their values are of no use any more
            node.meta.pop("tensor", None)
        self._constants.clear()
        self.calls.start()
        with aside():
            for name, tensor in held_tensors(module):
                self.put(tensor, name)
            for tensor in inputs:
                self.make(tensor, Value(tuple(tensor.shape), given=True))

    def make(self, tensor: Tensor, value: Value) -> fx.Node:
        """A node for a tensor of which is known what it carries."""
        node = self._node("placeholder", "made")
        self._describe(node, tensor)
        self.walk.values[node] = replace(value, shape=node.meta["shape"])
        self.put(tensor, node)
        return node

    def _node(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        """A node that stands in no list: nobody reads the graph in order."""
        self.count += 1
        return fx.Node(self.graph, f"node_{self.count}", op, target, args, kwargs or {})

    def put(self, tensor: Tensor, source: object) -> None:
        """Remember which node, or which tensor of the model, a tensor is."""
        known = (_state(tensor), source, tensor)
        self._objects[id(tensor)] = known
        self._waiting.append(known)

    def find(self, tensor: Tensor) -> Any:
        """What a tensor is that an op made or read before, or one with the same values."""
        known = self._objects.get(id(tensor))
        if known is not None and _unmoved(known[0], tensor):
            return known[1]
        for state, source, other in self._waiting:
            if _unmoved(state, other):
                self.identity.put(other, source)
        self._waiting.clear()
        return self.identity.find(tensor)

    def settle(self) -> None:
        """Tensors that are known may be given other values from here on."""
        for _, source, tensor in self._waiting:
            self.identity.put(tensor, source)
        self._waiting.clear()

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; parameters and constants become ``get_attr`` nodes.

        Raises:
            Undecided: it shares memory with a known one in a way that no op told of.
        """
        while FUNCTORCH.is_functorch_wrapped_tensor(tensor):
            tensor = FUNCTORCH.get_unwrapped(tensor)
        with torch._C.DisableTorchFunction():
            source = self.find(tensor)
        if isinstance(source, fx.Node):
            return source
        with aside():
            return self._held(tensor, source)

    def nodes_of(self, tensors: Iterable[Tensor]) -> tuple[fx.Node, ...]:
        """The nodes of what a function reads, other ones for other tensors.

        Results of two like calls are one node: it says what they carry, which is the same.
        """
        tensors = [*tensors]
        nodes = [self.node_of(tensor) for tensor in tensors]
        if len({*nodes}) == len(nodes):
            return tuple(nodes)
        first: dict[fx.Node, tuple[Any, ...]] = {}
        with aside():
            for place, tensor in enumerate(tensors):
                state, node = _state(tensor), self.node_of(tensor)
                if first.setdefault(node, state) != state:
                    node = self.make(tensor, self.walk.values[node])
                    first[node] = state
                nodes[place] = node
        return tuple(nodes)

    def _held(self, tensor: Tensor, source: str | None) -> fx.Node:
        if source is None:
            others = [self.find(other) for other in self.identity.neighbours(tensor)]
            values = self.walk.values
            if any(not isinstance(n, fx.Node) or values[n].layers for n in others):
                raise Undecided("a tensor shares memory with another in a way that no op told of")
        value = self.walk.slots(source) if source else None
        node = self._parameters.get(source) if source and value else None
        if node is None or node.meta["shape"] != tuple(tensor.shape):
            node = self._node("get_attr", source or f"constant_{self.count}")
            self._describe(node, tensor)
            if source and value and value.shape == node.meta["shape"]:
                self._parameters[source] = node
            else:
                value = Value(node.meta["shape"], constant=True)
                self._constants.append(node)
            self.walk.values[node] = value
        if not tensor.is_meta:
            node.meta["tensor"] = tensor
        self.put(tensor, node)
        return node

    def _describe(self, node: fx.Node, tensor: Tensor) -> None:
        stride = tensor.stride() if tensor.layout is torch.strided else ()
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, stride=stride)

    @aside()
    def op(
        self, target: object, args: object, kwargs: object, out: object, before: Any = None
    ) -> fx.Node:
        """An op that has run: its node, to which the rule of the op was applied.

        ``before`` are its arguments as nodes, where it has made others of their tensors.
        """
        read = self.nodes_in(args) if before is None else before
        node = self._node("call_function", target, read, self.nodes_in(kwargs))
        node.meta.update(numbers=[], transformed=FUNCTORCH.peek_interpreter_stack() is not None)
        if isinstance(out, Tensor):
            self._describe(node, out)
            self.put(out, node)
        elif isinstance(out, list | tuple):
            node.meta["items"] = items = {}
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    items[index] = part = self._node(
                        "call_function", operator.getitem, (node, index)
                    )
                    self._describe(part, item)
                    self.put(item, part)
        frozen = self.walk.ties.frozen
        known = len(frozen)
        self.walk.apply(node)
        if not self.walk.marks.sums(node):
            for ids, reason in frozen[known:]:
                self._check_passed(node, ids, reason)
        return node

    def _check_passed(self, node: fx.Node, ids: Tensor, reason: object) -> None:
        """Channels that an op mixes up here may have left where it does not, at other sizes."""
        gone = self.fates.gone(ids)
        if gone.size:
            results = [node, *node.meta.get("items", {}).values()]
            layers = [
                i for r in results if r in self.walk.values for i in self.walk.values[r].layers
            ]
            if not any(np.isin(gone, layer.numpy()).all() for layer in layers):
                raise Undecided(f"removed channels cannot be followed at these sizes: {reason}")

    def nodes_in(self, tree: object) -> Any:
        """Arguments with nodes in the place of tensors."""
        if isinstance(tree, Tensor):
            return self.node_of(tree)
        if isinstance(tree, tuple | list):
            items = [self.nodes_in(item) for item in tree]
            return items if type(tree) is list else tuple(items)
        if isinstance(tree, dict):
            return {key: self.nodes_in(value) for key, value in tree.items()}
        return tree

    @aside()
    def mask(self, node: fx.Node) -> Tensor | None:
        """A boolean mask that broadcasts to the value of a node; ``None`` when all stays."""
        if node not in self._masks:
            found = None
            for layer in self.walk.values[node].layers:
                stays = self.fates.stays(layer)
                if not stays.all():
                    keep = torch.from_numpy(stays)
                    found = keep if found is None else found & keep
            self._masks[node] = found
        return self._masks[node]

    @aside()
    def kept(self, node: fx.Node) -> list[Tensor]:
        """For each dimension of a value which of its positions stay."""
        found = [torch.ones(size, dtype=torch.bool) for size in node.meta["shape"]]
        for layer in self.walk.values[node].layers:
            stays = self.fates.stays(layer)
            for dim, size in enumerate(layer.shape):
                if size > 1:
                    rest = tuple(d for d in range(layer.dim()) if d != dim)
                    found[dim] &= torch.from_numpy(stays.any(axis=rest))
        return found


def _unmoved(state: tuple[Any, ...], tensor: Tensor) -> bool:
    """Whether a tensor is what it was: pooling rewrites strides of single places without an op."""
    now = _state(tensor)
    if now == state or now[:-1] != state[:-1]:
        return now == state
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, now[-1], state[-1]))


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor becomes another one without an op."""
    try:
        place = tensor.data_ptr() or tensor.untyped_storage()._cdata
        return place, tensor.shape, tensor.dtype, tensor.stride()
    except (NotImplementedError, RuntimeError):  # sparse, opaque, a class that wraps others
        return object(), ()
