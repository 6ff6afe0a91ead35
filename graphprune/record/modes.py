"""The modes that see what runs: torch functions with the ints given to them, and ATen ops."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.errors import PACKAGE
from graphprune.ops.calls import TENSOR, Args, Function, Kwargs, OpMode
from graphprune.ops.given import Number
from graphprune.ops.registry import WHOLE
from graphprune.ops.views import run_on_meta
from graphprune.record import attention
from graphprune.record.binding import INDEXING, numbers_given
from graphprune.record.sizes import Scale, Size, is_live, must_not_change, plain

aten = torch.ops.aten
TORCH = str(Path(torch.__file__).parent) + os.sep
_SHAPES = {TENSOR.shape.__get__, torch.Tensor.size}
_CHUNKS = {torch.chunk, torch.Tensor.chunk}
_SECTIONS = {torch.tensor_split, torch.Tensor.tensor_split}  # also at given places
_SIZES = {*_SHAPES, torch.Tensor.numel, torch.Tensor.nelement}
_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
_DISABLED = torch._C._disabled_torch_function_impl
_ATOMS = {int, float, bool, type(None)}
_LEAKS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


# Code of torch whose train mode acts position by position or on statistics of one channel.
_NEUTRAL = ("torch.", "torchvision.ops.", "graphprune.record.attention")


class EvalFlag(int):
    """``module.training`` of a model in eval mode, which notices other code that looks at it."""

    observer: Callable[[], None]

    def __new__(cls, observer: Callable[[], None]) -> EvalFlag:
        """A flag that is false."""
        self = super().__new__(cls, 0)
        self.observer = observer
        return self

    def _look(self) -> None:
        if not str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_NEUTRAL):
            self.observer()

    def __bool__(self) -> bool:
        """Tested."""
        self._look()
        return False

    def __eq__(self, other: object) -> bool:
        """Compared."""
        self._look()
        return other == 0

    def __hash__(self) -> int:
        """Looked up."""
        self._look()
        return 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A pickled flag is a plain one."""
        return bool, ()


def _sections(
    input: Any, indices_or_sections: Any = None, dim: int = 0, sections: Any = None, **others: Any
) -> tuple[Tensor, int, int] | None:
    """The arguments of ``tensor_split`` when it makes a number of parts, as equal as can be."""
    count = indices_or_sections if sections is None else sections
    count = others.get("tensor_indices_or_sections", count)
    if isinstance(count, Tensor) and not count.dim() and not count.is_meta:
        with _plain():
            count = int(count)
    return (input, plain(count), plain(dim)) if isinstance(count, int) else None


def _without_flags(args: Args, kwargs: Kwargs) -> tuple[object, object]:
    """Arguments in which flags are plain."""
    if EvalFlag in map(type, args) or EvalFlag in map(type, kwargs.values()):
        args = tuple(False if type(value) is EvalFlag else value for value in args)
        kwargs = {k: False if type(value) is EvalFlag else value for k, value in kwargs.items()}
    return args, kwargs


def leak(tensor: Tensor) -> None:
    """Stands in the graph for a tensor whose values leave torch."""


def lost(*tensors: Tensor) -> Tensor:
    """Stands in the graph for a tensor that may hold anything computed from others."""
    raise RuntimeError("a tensor came about where it cannot be followed: it cannot be made again")


REASONS = {leak: "values leave torch", lost: "a tensor that cannot be followed"}
for _function, _text in REASONS.items():
    vars(_function)["reason"] = _text


class Functions(TorchFunctionMode):
    """Sees torch functions with the ints that the user's code gave them."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        args, kwargs = _without_flags(args, kwargs)
        if recorder.opaque:
            return func(*args, **kwargs)
        if func in _SIZES:
            return self._size(func, args, kwargs)
        if _replaced(func, types, kwargs):
            with self:
                return attention.multi_head_attention_forward(*args, **kwargs)
        if func is torch.Tensor.__len__:
            recorder.record.lengths = True
            rows = recorder.extents(args[0])[0]
            must_not_change(rows)
            int(rows)  # it goes on as a plain int
        caller, recorder.caller = recorder.caller, recorder.caller or sys._getframe(1)
        self._note(func, args, kwargs)
        try:
            if func in _VALUES:
                return self._values(func, args, kwargs)
            if func is torch.einsum and isinstance(args[0], str):
                tensors = args[1] if isinstance(args[1], list | tuple) else args[1:]
                return recorder.whole(aten.einsum.default, (args[0], [*tensors]), kwargs)
            if func in _SECTIONS and (sections := _sections(*args, **kwargs)) is not None:
                recorder.numbers = []  # parts of any width: all sizes follow
                return recorder.whole(aten.tensor_split.sections, sections, {})
            if func in WHOLE and not _special(types):
                return recorder.whole(WHOLE[func], args, kwargs)
            if func in INDEXING:
                args = (args[0], _with_tensors(args[1]), *args[2:])
            out = func(*args, **kwargs)
        finally:
            recorder.numbers = []
            recorder.caller = caller
        if func is TENSOR.data.__get__:
            recorder.call(aten.detach.default, args, {}, out)
        elif func in _LEAKS:
            recorder.call(leak, args[:1], {}, None)
            recorder.last.meta["looks"] = in_hook(sys._getframe(1))
        return out

    def _note(self, func: Function, args: Args, kwargs: Kwargs) -> None:
        """The numbers that the user's code gives to a function, and where they stand."""
        recorder = self.recorder
        if any(map(_is_float, args)) or any(map(_is_float, kwargs.values())):
            recorder.doubt_floats()
        found = [] if func in _CHUNKS else numbers_given(func, args, kwargs)
        if recorder.sizes:
            found = self._of_caller(found)
        recorder.numbers = [n._replace(value=_of_today(n.value)) for n in found]
        name = getattr(func, "__name__", "")
        recorder.method = getattr(torch.Tensor, name, None) is func
        reflected = name.startswith("__r") and hasattr(torch.Tensor, f"__{name[3:]}")
        recorder.count = -1 if reflected else len(args)
        recorder.names_of_args = _names(func)
        if recorder.sizes:
            recorder.method, recorder.count = False, 0
            recorder.names_of_args = _names(F.multi_head_attention_forward)

    def _of_caller(self, found: Sequence[Number]) -> list[Number]:
        """Of numbers that a function standing for one of torch gives, those it was given itself."""
        places = {id(size): (name,) for name, size in self.recorder.sizes.items()}
        return [n._replace(path=places[id(n.value)]) for n in found if id(n.value) in places]

    def _size(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """A shape, a size or a number of elements that knows where it comes from."""
        shape = self.recorder.extents(args[0])
        if func not in _SHAPES:
            product: int = 1
            for size in shape:
                product = product * size
            return product
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return shape if dim is None else shape[dim]

    def _values(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """A tensor made of numbers: sizes among them must not change."""
        given = args[1:] if func is torch.Tensor.new_tensor else args
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((given, kwargs))):
            return func(*args, **kwargs)
        for number in self.recorder.numbers:
            must_not_change(number.value)
        if func is torch.Tensor.new_tensor:
            like = {"dtype": args[0].dtype, "device": args[0].device}
            func, args, kwargs = torch.tensor, args[1:], {**like, **kwargs}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            return self.recorder.constant(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def in_hook(frame: FrameType | None) -> bool:
    """Whether the code of a frame was called by a hook of a module."""
    while frame is not None and frame.f_back is not None:
        before = frame.f_back
        if before.f_globals.get("__name__") == "torch.nn.modules.module":
            hook = before.f_locals.get("hook")
            hook = getattr(hook, "func", hook)  # of functools.partial
            call = inspect.getattr_static(type(hook), "__call__", None)
            known = (hook, getattr(hook, "__func__", None), call)
            return any(getattr(item, "__code__", None) is frame.f_code for item in known)
        frame = before
    return False


class Dispatch(OpMode):
    """Sees the ATen ops."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        recorder, kwargs = self.recorder, kwargs or {}
        if recorder.device == "meta":
            args, kwargs = on_one_device(recorder, func, args, kwargs)
        on_meta = recorder.device == "meta"
        moves = torch.Tag.inplace_view in func.tags and not recorder.opaque
        before = recorder.plain(args) if moves else None  # it is read where it was
        out = run_on_meta(func, args, kwargs) if on_meta else func(*args, **kwargs)
        if not recorder.opaque and func.overloadpacket is not aten.set_:  # seen by its storage
            recorder.call(func, args, kwargs, out, before)
        return out


def _replaced(func: Function, types: object, kwargs: Kwargs) -> bool:
    """Whether the user's own code calls attention as a function, with nothing out of the common."""
    if func is not F.multi_head_attention_forward:
        return False
    caller = sys._getframe(4)  # of the function of torch, which asked for the mode
    static = kwargs.get("static_k") is not None or kwargs.get("static_v") is not None
    own = not caller.f_code.co_filename.startswith((TORCH, PACKAGE))
    return own and not static and not _special(types)


def _special(types: Any) -> bool:
    """Whether a class of tensors wants to see the functions that act on it."""
    return any(kind.__torch_function__ is not _DISABLED and kind is not Tensor for kind in types)


def _is_float(value: object) -> bool:
    """Whether it is a float that does not know what it was computed from."""
    kind = type(value)
    return kind is float or kind.__module__ == "numpy"


def _of_today(number: object) -> Any:
    """Sizes that a cache of the user kept from an earlier recording are plain numbers."""
    return plain(number) if isinstance(number, Size | Scale) and not is_live(number) else number


@functools.cache
def _names(func: object) -> tuple[str, ...]:
    """The names of the arguments of a function of torch that is written in Python."""
    code = getattr(func, "__code__", None)
    return code.co_varnames[: code.co_argcount] if code is not None else ()


def on_one_device(recorder: Any, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of an op on ``meta``, where constants of the code that lie elsewhere come too.

    Raises:
        RuntimeError: the op would write what it computes into one of these; it is not the same one
            that the code goes on with.
    """
    if not (_mixed((args, kwargs)) and _meta((args, kwargs))):
        return args, kwargs
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and _mixed(named.get(argument.name)):
            raise RuntimeError(f"{func} writes on another device than the one it reads on")
    return pytree.tree_map_only(Tensor, _to_meta(recorder), (args, kwargs))


def _to_meta(recorder: Any) -> Callable[[Tensor], Tensor]:
    """Moves constants that live on another device to meta, keeping their node."""

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        with _plain():
            moved = torch.empty_like(tensor, device="meta")
        if not recorder.opaque:  # else it is inside of an op, which has its node already
            recorder.identity.put(moved, recorder.node_of(tensor))
        return moved

    return move


def _mixed(tree: object) -> bool:
    """Whether any tensor of the arguments is not on meta."""
    if type(tree) in _ATOMS:
        return False
    if isinstance(tree, Tensor):
        return not tree.is_meta
    if isinstance(tree, tuple | list):
        return any(map(_mixed, tree))
    return isinstance(tree, dict) and any(map(_mixed, tree.values()))


def _meta(tree: object) -> bool:
    """Whether any tensor of the arguments is on meta."""
    return any(leaf.is_meta for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _with_tensors(index: object) -> object:
    """Lists of positions in an index as tensors, whose values are remembered."""
    if isinstance(index, list) and index and all(type(i) is int for i in index):
        with _plain():
            return torch.tensor(index)
    return tuple(map(_with_tensors, index)) if type(index) is tuple else index


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Outside all modes."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        yield
