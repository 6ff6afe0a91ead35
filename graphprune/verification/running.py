"""Run a model's own code with removed channels held at zero in everything that sums over them.

Every function of torch that the code calls runs first on ``meta``, which tells the ops it is made
of; the rule of each op tells what it does to channels. Where none of them sums over channels, the
function runs as it is. Where one does, its ops run one by one on the real tensors: what such an op
reads is zeroed where channels are removed, and statistics are taken over the kept ones. All of that
happens above autograd, so that gradients flow as in the model.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.ops.calls import FUNCTORCH, TENSOR, Args, Function, Kwargs
from graphprune.ops.registry import WHOLE, op_of, packet_of
from graphprune.ops.views import run_on_meta
from graphprune.record.evaluate import run as run_op
from graphprune.verification.calls import (
    RESHAPES,
    Answer,
    Call,
    changes,
    fits,
    looks,
    takes_any_size,
    tensors_in,
)
from graphprune.verification.dispatch import Dispatch, Draw, masked, random_op, zeroed
from graphprune.verification.follow import Follower, Undecided, aside

aten = torch.ops.aten
_VIEWS = {getattr(TENSOR, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_ALIASES = {TENSOR.data.__get__: aten.detach.default}
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


_MOVES = {  # make another tensor of an object
    "__set__", "set_", "resize_", "resize_as_", "as_strided_", "t_", "transpose_", "squeeze_",
    "unsqueeze_", "swapaxes_", "swapdims_",
}  # fmt: skip
_HEAVY = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
          "conv_transpose3d"}  # fmt: skip # seldom right as they are: not worth a run to see that
_SIMPLE = {"relu", "silu", "softmax", "log_softmax", "layer_norm", "group_norm", "embedding",
           "dropout"}  # fmt: skip # written in Python, but made of one op, the same on all devices
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_outside: Any = torch._C._DisableTorchDispatch
_aside: Any = torch._C.DisableTorchFunction


def backward(tensors: Any, grad_tensors: Any, **kwargs: Any) -> None:
    """``torch.autograd.backward`` that no mode of functions is left for."""
    engine = torch.autograd.graph._engine_run_backward
    given = tuple(tensors), tuple(grad_tensors)
    engine(*given, False, False, (), allow_unreachable=True, accumulate_grad=True)


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
        self.backward = False  # the mode that sees ops is there in the forward only
        self.seen: tuple[Sequence[fx.Node], Any] | None = None  # of the last function

    def __torch_function__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> Any:
        before, self.dispatch.known = self.dispatch.known, True
        try:
            return self._called(func, args, kwargs or {})
        finally:
            self.dispatch.known = before

    def _called(self, func: Any, args: Any, kwargs: Any) -> object:
        if func in _LOOKS or FUNCTORCH.peek_interpreter_stack() is not None:
            return self._run(func, args, kwargs)
        if func is torch.autograd.backward:  # of what is checkpointed inside of checkpointed parts
            with self:
                backward(*args, **kwargs)
            return None
        name = getattr(func, "__name__", "")
        if name == "__get__" and func not in _VIEWS:
            out = self._run(func, args, kwargs)
            if func in _ALIASES:
                self.follower.op(_ALIASES[func], args, {}, out)
            return out
        if func in RESHAPES and args:
            return self._reshaped(func, args, kwargs)
        call = None
        if name in _MOVES:
            self.follower.settle()
        elif "out" not in kwargs:
            with _outside(), _aside():
                call = self.follower.calls.call(func, args, kwargs, self.follower.nodes_of)
        answer = None if call is None else self.follower.calls.find(call)
        if call is not None and answer is not None and self._serves(answer, call):
            return self._again(answer, call, func, args, kwargs)
        return self._followed(call, func, args, kwargs)

    def _serves(self, answer: Answer, call: Call) -> bool:
        """Whether a call can be run by what is known of one like it."""
        return answer.any_size or answer.is_of(call) or not self._reads(answer)

    def _reads(self, answer: Answer) -> bool:
        """Whether a function sums over channels that are removed."""
        return any(masked(self.follower, node) for node in answer.readers)

    def _reshaped(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """A function whose answer the shape of its result tells."""
        node = self.follower.node_of(args[0])
        with self._unwatched((), args, kwargs):
            out = func(*args, **kwargs)
        call = self.follower.calls.reshape(node, tuple(out.shape))
        answer = None if call is None else self.follower.calls.find(call)
        if answer is not None and self._found(answer, [out]):
            return out
        return self._followed(call, func, args, kwargs)

    def _unwatched(
        self, nodes: Sequence[fx.Node], args: object, kwargs: object
    ) -> contextlib.AbstractContextManager[object]:
        """Known ops need not be seen, but for random numbers, and tensors of other classes."""
        plain = all(type(tensor) in _PLAIN for tensor in tensors_in((args, kwargs)))
        draws = any(random_op(n.target) for n in nodes)
        if draws or not plain:
            return self._seeing()
        return _outside()

    @contextlib.contextmanager
    def _seeing(self) -> Iterator[None]:
        """The mode that sees ops, where it is not there anyway."""
        if not self.backward:
            yield
            return
        self.backward = False
        try:
            with self.dispatch:
                yield
        finally:
            self.backward = True

    def _again(
        self, answer: Answer, call: Call, func: object, args: object, kwargs: object
    ) -> object:
        """Run a function of which is known what it does to ids."""
        tensors = [*tensors_in((args, kwargs))]
        with self._unwatched(answer.nodes, args, kwargs):
            if self._reads(answer):
                values = dict(zip(answer.call.inputs, tensors))
                with torch._C.DisableTorchFunction():
                    out = self._steps(answer.nodes, values, answer.told, tensors)
            else:
                out = self._run(func, args, kwargs, answer.nodes)
        if self._found(answer, [*tensors_in(out)]):
            return out
        if answer.draws or any(changes(node) for node in answer.nodes):
            raise Undecided(f"{_name(func)} makes tensors of other shapes for other values")
        return self._followed(None, func, args, kwargs)

    def _found(self, answer: Answer, tensors: list[Tensor]) -> bool:
        """Give results the ids that are known of them; whether these fit."""
        values, same = self.follower.walk.values, len(tensors) == len(answer.results)
        with _outside(), _aside():
            for node, tensor in zip(answer.results, tensors):
                same = same and (node.meta["shape"] == tensor.shape or fits(values[node], tensor))
            for node, tensor in zip(answer.results, tensors) if same else ():
                if node.meta["shape"] == tensor.shape:
                    self.follower.put(tensor, node)
                else:
                    self.follower.make(tensor, values[node])
        return same

    def _followed(self, call: Call | None, func: object, args: object, kwargs: object) -> object:
        """Take a function apart, follow its ops, and remember what they did."""
        ties = self.follower.walk.ties
        self.seen, size = None, ties.size
        if call is None:
            self.follower.nodes_of(tensors_in((args, kwargs)))
        with self._seeing():
            out = self._function(func, args, kwargs)
        if call is not None and self.seen is not None:
            self._remember_call(call, *self.seen, ties.size > size)
        return out

    @aside()
    def _remember_call(
        self, call: Call, nodes: Sequence[fx.Node], told: object, fresh: bool
    ) -> None:
        made = {*call.inputs, *nodes}
        made |= {item for node in nodes for item in node.meta.get("items", {}).values()}
        if any(source not in made for node in nodes for source in node.all_input_nodes):
            return  # it reads a constant, which may be another one the next time
        results = [self.follower.find(leaf) for leaf in tensors_in(told)]
        tree = pytree.tree_map_only(Tensor, self.follower.find, told)
        leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, fx.Node)]
        if leaves != results:
            return
        draws = any(random_op(n.target) for n in nodes)
        free = not fresh and not draws and takes_any_size(call.parts[0], nodes)
        readers = tuple(node for node in nodes if self.follower.walk.marks.sums(node))
        self.follower.calls.put(
            Answer(call, tuple(nodes), readers, tree, tuple(results), free, fresh, draws)
        )

    def _function(self, func: Any, args: Any, kwargs: Any) -> Any:
        whole = WHOLE.get(func) if "out" not in kwargs else None
        if func is torch.einsum and isinstance(args[0], str):
            tensors = args[1] if isinstance(args[1], list | tuple) else args[1:]
            whole, args = aten.einsum.default, (args[0], [*tensors])
        if whole is not None:
            return self._whole(whole, args, kwargs)
        name = getattr(func, "__name__", "")
        simple = name in _SIMPLE if isinstance(func, types.FunctionType) else name not in _HEAVY
        quick = simple and not (self.follower.careful or name.endswith("_"))
        twins = None if quick else self._twins((args, kwargs))
        if twins is not None:
            try:
                nodes, told = self._apart(func, *twins)
            except Undecided:
                raise
            except Exception:  # it looks at values, or its result on meta is not known to torch
                return self._on_values(func, args, kwargs)
            self.seen = nodes, told
            if any(masked(self.follower, node) for node in nodes):
                return self._masked(nodes, told, args, kwargs)
            with self._unwatched(nodes, args, kwargs):
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

    def _remember(self, drawn: Sequence[tuple[object, Tensor]], nodes: Iterable[fx.Node]) -> None:
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
        self.seen = [node], told
        if masked(self.follower, node):
            return self._masked([node], told, args, kwargs)
        out = self._run(kernel, args, kwargs, [node])
        self._match(told, out)
        return out

    @aside()
    def _twins(self, tree: object) -> Any:
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

    def _apart(self, func: Function, args: Args, kwargs: Kwargs) -> tuple[list[fx.Node], Any]:
        """The ops that a function is made of, and what it returns."""
        nodes: list[fx.Node] = []
        self.dispatch.nodes = nodes
        try:
            with torch.no_grad():
                return nodes, func(*args, **kwargs)
        finally:
            self.dispatch.nodes = None

    def _on_values(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """Run a function on values, and take it apart at once."""
        nodes: list[fx.Node] = []
        self.dispatch.nodes, start = nodes, len(self.dispatch.drawn)
        try:
            out = func(*args, **kwargs)
        finally:
            self.dispatch.nodes = None
        if self.dispatch.watched:
            self._remember(self.dispatch.drawn[start:], nodes)
        if not any(looks(node) for node in nodes):
            self.seen = nodes, out
        if not any(masked(self.follower, node) for node in nodes):
            return out
        if any(changes(node) or random_op(node.target) for node in nodes):
            raise Undecided(f"{_name(func)} cannot run twice, as it changes a tensor or draws")
        return self._masked(nodes, out, args, kwargs)

    def _masked(self, nodes: Sequence[fx.Node], told: object, args: object, kwargs: object) -> Any:
        """The ops of a function one by one, on real tensors."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = {self.follower.node_of(tensor): tensor for tensor in tensors}
        tree = pytree.tree_map_only(Tensor, self.follower.node_of, told)
        out = self._steps(nodes, values, tree, tensors)
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, fx.Node):
                self.follower.put(values[leaf], leaf)
        return out

    def _steps(
        self,
        nodes: Sequence[fx.Node],
        values: dict[fx.Node, Any],
        tree: object,
        tensors: Sequence[Tensor],
    ) -> Any:
        """Run ops; returns the tree with their values in the place of nodes."""
        device = tensors[-1].device if tensors else torch.device("cpu")
        start = len(self.dispatch.drawn)
        for node in nodes:
            values[node] = out = self._step(node, values, device)
            for index, part in node.meta.get("items", {}).items():
                values[part] = out[index]
        if self.dispatch.watched:
            self._remember(self.dispatch.drawn[start:], nodes)
        return pytree.tree_map_only(fx.Node, values.__getitem__, tree)

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
        if node.target is aten.native_group_norm.default:
            args = (*args[:3], len(args[0]), args[4], args[0][0, 0].numel(), *args[6:])
        if reads and not self.follower.plain:
            rule = op_of(node).masked
            keep = self.follower.mask(node.all_input_nodes[0])
            if rule is not None and keep is not None:
                out = rule(keep.to(args[0].device), *args, **kwargs)
                out = run_op(node, args, kwargs) if out is NotImplemented else out
                return self._harmless(node, out)
        out = run_op(node, args, kwargs)
        return self._harmless(node, out) if reads and packet_of(node) is aten.sum else out

    def _harmless(self, node: fx.Node, out: Any) -> object:
        """Statistics of rows that leave: one instead of zero, as code may divide by them."""
        if isinstance(out, tuple | list):
            items = node.meta["items"]
            return [
                self._harmless(items[i], part) if i in items else part for i, part in enumerate(out)
            ]
        keep = self.follower.mask(node) if isinstance(out, Tensor) else None
        if keep is None or not out.is_floating_point():
            return out
        return torch.where(keep.to(out.device), out, 1)

    @aside()
    def _match(self, told: object, real: object) -> None:
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


def _name(func: object) -> str:
    return getattr(func, "__name__", str(func))
