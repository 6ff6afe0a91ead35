"""Run a model's own code with removed channels held at zero in everything that sums over them.

Every function of torch that the code calls runs first on ``meta``, which tells the ops it is made
of; the rule of each op tells what it does to channels. Where none of them sums over channels, the
function runs as it is. Where one does, its ops run one by one on the real tensors: what such an op
reads is zeroed where channels are removed, and statistics are taken over the kept ones. All of that
happens above autograd, so that gradients flow as in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.ops.registry import WHOLE, op_of
from graphprune.ops.views import run_on_meta
from graphprune.record.evaluate import run as run_op
from graphprune.verification.follow import Follower, Undecided, aside

aten = torch.ops.aten
_functorch: Any = torch._C._functorch
_TENSOR: Any = torch.Tensor  # with its attributes as descriptors
_VIEWS = {getattr(_TENSOR, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_ALIASES = {_TENSOR.data.__get__: aten.detach.default}
_LOOKS = {  # say something about a tensor, and make none
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.stride, torch.Tensor.numel,
    torch.Tensor.is_floating_point, torch.Tensor.__len__, torch.Tensor.is_contiguous,
    torch.Tensor.__hash__, torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.item,
    torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__,
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.backward, torch.Tensor.is_complex,
    torch.Tensor.nelement, torch.Tensor.get_device, torch.Tensor.untyped_storage,
    torch.Tensor.storage_offset, torch.Tensor.data_ptr, torch.Tensor.register_hook,
    torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel, torch.equal,
    torch.allclose,
}  # fmt: skip


def masked(follower: Follower, node: fx.Node) -> bool:
    """Whether an op that sums over channels reads some that are removed."""
    reads = follower.walk.marks.sums(node)
    return reads and any(follower.mask(source) is not None for source in node.all_input_nodes)


def zeroed(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where the mask is false, whatever stood there."""
    if keep is None:
        return tensor
    return torch.where(keep.to(tensor.device), tensor, tensor.new_zeros(()))


Draw = tuple[Any, Tensor, list[Tensor]]  # the op, its random numbers, what stays of them


class Dispatch(TorchDispatchMode):
    """Sees the ATen ops: those that a function is made of, and those that no function ran."""

    def __init__(self, follower: Follower) -> None:
        TorchDispatchMode.__init__(self)
        self.follower = follower
        self.nodes: list[fx.Node] | None = None  # of the function that is taken apart
        self.known = False  # whether a function that was taken apart runs
        self.watched = False  # whether random numbers are remembered
        self.drawn: list[tuple[Any, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.nodes is None and self.known:
            out = func(*args, **kwargs)
            self._watch(func, args, out)
            return out
        on_meta = _on_meta((args, kwargs))
        out = run_on_meta(func, args, kwargs) if on_meta else func(*args, **kwargs)
        node = self.follower.op(func, args, kwargs, out)
        if not on_meta:
            self._watch(func, args, out)
        if self.nodes is not None:
            self.nodes.append(node)
        elif masked(self.follower, node):
            raise Undecided(f"{func} sums over removed channels in code that torch compiled")
        return out

    def _watch(self, func: Any, args: Any, out: Any) -> None:
        if self.watched and random_op(func):
            self.drawn.append((func, numbers_of(func, args, out).detach().clone()))


def random_op(func: Any) -> bool:
    """Whether an op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def numbers_of(func: Any, args: Any, out: Any) -> Tensor:
    """The random numbers that an op has drawn."""
    if func in NOISY:
        found: Tensor = args[1]
        return found
    return out[-1] if isinstance(out, tuple) else out


NOISY = {aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default}


def _on_meta(tree: Any) -> bool:
    return any(leaf.is_meta for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


class Functions(TorchFunctionMode):
    """Sees the functions of torch that the code of a model calls, and masks what they read.

    Args:
        follower: knows what stays of every tensor.
        draws: remember random numbers, in ``draws``, with the positions of them that stay.
    """

    def __init__(self, follower: Follower, draws: bool = False) -> None:
        super().__init__()
        self.follower = follower
        self.dispatch = Dispatch(follower)
        self.dispatch.watched = draws
        self.draws: list[Draw] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.dispatch.known = self.dispatch.known, True
        try:
            return self._called(func, args, kwargs or {})
        finally:
            self.dispatch.known = before

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _LOOKS or _functorch.peek_interpreter_stack() is not None:
            return self._run(func, args, kwargs)
        if getattr(func, "__name__", "") == "__get__" and func not in _VIEWS:
            out = self._run(func, args, kwargs)
            if func in _ALIASES:
                self.follower.op(_ALIASES[func], args, {}, out)
            return out
        whole = WHOLE.get(func) if "out" not in kwargs else None
        if func is torch.einsum and isinstance(args[0], str):
            tensors = args[1] if isinstance(args[1], list | tuple) else args[1:]
            whole, args = aten.einsum.default, (args[0], [*tensors])
        if whole is not None:
            return self._whole(whole, args, kwargs)
        twins = self._twins((args, kwargs))
        if twins is not None:
            try:
                nodes, told = self._apart(func, *twins)
            except Undecided:
                raise
            except Exception:  # it looks at values, or its result on meta is not known to torch
                return self._on_values(func, args, kwargs)
            if any(masked(self.follower, node) for node in nodes):
                return self._masked(nodes, told, args, kwargs)
            out = self._run(func, args, kwargs, nodes)
            self._match(told, out)
            return out
        return self._on_values(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any, nodes: Sequence[fx.Node] = ()) -> Any:
        """A function as it is."""
        start = len(self.dispatch.drawn)
        out = func(*args, **kwargs)
        if self.dispatch.watched:
            self._remember(self.dispatch.drawn[start:], nodes)
        return out

    def _remember(self, drawn: Sequence[tuple[Any, Tensor]], nodes: Iterable[fx.Node]) -> None:
        """Random numbers with the positions that stay: all, where they cannot be followed."""
        sources = [node for node in nodes if random_op(node.target)]
        for place, (func, numbers) in enumerate(drawn):
            kept = [torch.ones(size, dtype=torch.bool) for size in numbers.shape]
            if len(sources) == len(drawn):
                node = sources[place]
                node = node.meta["items"][0] if "items" in node.meta else node
                if node.meta["shape"] == tuple(numbers.shape):
                    kept = self.follower.kept(node)
            self.draws.append((func, numbers, kept))

    def _whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A function that counts as one op."""
        names = [a.name for a in target._schema.arguments[len(args) : 3] if a.name in kwargs]
        args = (*args, *(kwargs[name] for name in names))
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
        kernel = op_of(target).kernel or target
        twin_args, twin_kwargs = self._twins((args, kwargs))
        with torch.no_grad():
            told = run_on_meta(target, twin_args, twin_kwargs)
        node = self.follower.op(target, twin_args, twin_kwargs, told)
        if masked(self.follower, node):
            return self._masked([node], told, args, kwargs)
        out = self._run(kernel, args, kwargs, [node])
        self._match(told, out)
        return out

    @aside()
    def _twins(self, tree: Any) -> Any:
        """Arguments with a tensor on ``meta`` for each tensor; ``None`` when there is none."""
        twins: dict[int, Tensor] = {}

        def twin(tensor: Tensor) -> Tensor:
            if id(tensor) not in twins:
                node = self.follower.node_of(tensor)
                strides = node.meta["stride"] or torch.empty(tensor.shape, device="meta").stride()
                made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
                twins[id(tensor)] = made
                self.follower.put(made, node)
            return twins[id(tensor)]

        changed = pytree.tree_map_only(Tensor, twin, tree)
        return changed if twins else None

    def _apart(self, func: Any, args: Any, kwargs: Any) -> tuple[list[fx.Node], Any]:
        """The ops that a function is made of, and what it returns."""
        nodes: list[fx.Node] = []
        self.dispatch.nodes = nodes
        try:
            with torch.no_grad():
                return nodes, func(*args, **kwargs)
        finally:
            self.dispatch.nodes = None

    def _on_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function on values, and take it apart at once."""
        nodes: list[fx.Node] = []
        self.dispatch.nodes, start = nodes, len(self.dispatch.drawn)
        try:
            out = func(*args, **kwargs)
        finally:
            self.dispatch.nodes = None
        if self.dispatch.watched:
            self._remember(self.dispatch.drawn[start:], nodes)
        if not any(masked(self.follower, node) for node in nodes):
            return out
        if any(_changes(node) or random_op(node.target) for node in nodes):
            raise Undecided(f"{_name(func)} cannot run twice, as it changes a tensor or draws")
        return self._masked(nodes, out, args, kwargs)

    def _masked(self, nodes: Sequence[fx.Node], told: Any, args: Any, kwargs: Any) -> Any:
        """The ops of a function one by one, on real tensors."""
        values: dict[fx.Node, Any] = {}
        device = torch.device("cpu")
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                values[self.follower.node_of(leaf)] = leaf
                device = leaf.device
        start = len(self.dispatch.drawn)
        for node in nodes:
            values[node] = out = self._step(node, values, device)
            for index, part in node.meta.get("items", {}).items():
                values[part] = out[index]
        if self.dispatch.watched:
            self._remember(self.dispatch.drawn[start:], nodes)

        def real(leaf: Tensor) -> Tensor:
            node = self.follower.node_of(leaf)
            self.follower.put(values[node], node)
            found: Tensor = values[node]
            return found

        return pytree.tree_map_only(Tensor, real, told)

    def _step(self, node: fx.Node, values: Mapping[fx.Node, Any], device: torch.device) -> Any:
        reads = masked(self.follower, node)

        def value(source: fx.Node) -> Any:
            found = values.get(source, source.meta.get("tensor"))
            if found is None:
                raise Undecided(f"a constant of {_name(node.target)} has no value")
            return zeroed(found, self.follower.mask(source)) if reads else found

        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs = {**kwargs, "device": device}
        if reads and not self.follower.plain:
            rule = op_of(node).masked
            keep = self.follower.mask(node.all_input_nodes[0])
            if rule is not None and keep is not None:
                out = rule(keep.to(args[0].device), *args, **kwargs)
                if out is not NotImplemented:
                    return out
        return run_op(node, args, kwargs)

    @aside()
    def _match(self, told: Any, real: Any) -> None:
        """What a function returned is what it was said to return."""
        left, right = (
            [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in (told, real)
        )
        if len(left) != len(right):
            raise Undecided("a function returns other tensors on values than on meta")
        for told_leaf, leaf in zip(left, right):
            node = self.follower.find(told_leaf)
            if node is not None:
                self.follower.put(leaf, node)


def _changes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))
