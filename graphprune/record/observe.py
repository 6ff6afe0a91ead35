"""See every product of an activation with a parameter while the user's own model runs.

No hooks on modules and no list of layer classes: functional calls, shared modules and layers
written by hand are seen like any other.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.modules.module as nn_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from graphprune.ops.calls import TENSOR, Args, Function, Kwargs
from graphprune.record.tensors import named_modules, named_tensors

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Product:
    """One product of an activation with a parameter, as it has just run.

    Attributes:
        weight: name of the parameter (its first name when tied). For a weight computed from
            parameters (weight norm, ``torch.nn.utils.prune``) the parameter of the same shape.
        bias: name of the bias added in the same call, if it is a parameter.
        kind: ``"linear"``, ``"convolution"`` or ``"transposed"`` (a transposed convolution).
        input: shape [..., in] (linear) or [batch, in, *places].
        output: shape [..., out] or [batch, out, *places].
        value: the weight as it was used; ``[out, in]``, ``[out, in / groups, *kernel]``, or for
            transposed convolutions ``[in, out / groups, *kernel]``.
        stride, dilation: for convolutions, one int per spatial dimension.
        pads: zeros before and after, per spatial dimension. For transposed convolutions what is
            cut from the border.
        groups: of a convolution.
        flipped: the parameter is stored as ``[in, out]`` (``x @ weight``), unlike ``value``.
        start: the first row of ``value`` in a parameter that holds several weights.
        computed: the weight is computed from the parameter, not the parameter itself.
    """

    weight: str
    bias: str | None
    kind: str
    input: Tensor
    output: Tensor
    value: Tensor
    stride: tuple[int, ...] = ()
    pads: Pads = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    flipped: bool = False
    start: int = 0
    computed: bool = False


Callback = Callable[[Product], Tensor | None]


@contextlib.contextmanager
def observing(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Call ``callback`` after every product of an activation with a parameter of ``model``.

    Args:
        model: whose parameters count; run it inside the ``with`` block. It is not changed.
        callback: gets a :class:`Product`; a tensor that it returns takes the place of the output.

    Example:
        >>> import torch
        >>> from graphprune.record.observe import observing
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> seen = []
        >>> with observing(net, lambda product: seen.append(product.weight)):
        ...     out = net(torch.ones(3, 4))
        >>> seen
        ['0.weight', '2.weight']
    """
    mode = _Products(model, callback)
    handle = nn_module.register_module_forward_hook(mode.computed_by)
    try:
        with mode:
            yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Known:
    """What a tensor is: (part of) a parameter, possibly transposed."""

    name: str
    flipped: bool = False
    start: int = 0
    computed: bool = False


_SAME = {
    torch.Tensor.detach, torch.detach, torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float,
    torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.contiguous,
    torch.Tensor.clone, torch.clone, TENSOR.data.__get__,
}  # fmt: skip
_FLIPS = {
    torch.Tensor.t, torch.t, TENSOR.T.__get__, TENSOR.mT.__get__,
    torch.Tensor.transpose, torch.transpose, torch.Tensor.swapaxes, torch.swapaxes,
}  # fmt: skip
_PARTS = {
    torch.Tensor.chunk, torch.chunk, torch.Tensor.split, torch.split, torch.Tensor.unbind,
    torch.functional.split,
}  # fmt: skip
_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_MATMULS = {
    torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__,
}  # fmt: skip
_ADDMMS = {torch.addmm, torch.Tensor.addmm}


class _Products(TorchFunctionMode):
    def __init__(self, model: nn.Module, callback: Callback) -> None:
        super().__init__()
        self.modules = named_modules(model)
        self.names = {id(module): name for name, module in self.modules}
        self.known = {id(tensor): _Known(name) for name, tensor in named_tensors(model)}
        self.alive: list[Tensor] = []  # tensors whose id() is a key of ``known``
        self.running: set[int] = set()
        self.callback = callback

    def __torch_function__(
        self, func: Function, types_: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _unguarded(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _SAME or func in _FLIPS or func in _PARTS:
            self._follow(func, args, kwargs, out)
            return out
        product = None
        if func is F.linear:
            product = self._linear(out, *args, **kwargs)
        elif func in _CONVOLUTIONS:
            product = self._convolution(out, _CONVOLUTIONS[func], *args, **kwargs)
        elif func in _TRANSPOSED:
            product = self._transposed(out, _TRANSPOSED[func], *args, **kwargs)
        elif func in _MATMULS and len(args) == 2:
            product = self._matmul(out, *args)
        elif func in _ADDMMS and len(args) == 3 and not kwargs:
            product = self._matmul(out, args[1], args[2], args[0])
        if product is None:
            return out
        replaced = self.callback(product)
        return out if replaced is None else replaced

    def computed_by(self, module: nn.Module, args: object, out: object) -> None:
        """After a forward: what a parametrization returns stands for its parameter."""
        if isinstance(module, ParametrizationList) and isinstance(out, Tensor):
            prefix = self.names.get(id(module))
            for name, tensor in module._parameters.items():
                if prefix and tensor is not None and tensor.shape == out.shape:
                    source = self.known.get(id(tensor), _Known(f"{prefix}.{name}"))
                    self._remember(out, _Known(source.name, computed=True))

    def _remember(self, tensor: Tensor, known: _Known) -> None:
        self.known[id(tensor)] = known
        self.alive.append(tensor)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Views, casts and parts of a parameter are known as well."""
        known = self.known.get(id(args[0]))
        if known is None:
            return
        if func in _SAME and isinstance(out, Tensor) and id(out) not in self.known:
            self._remember(out, known)
        elif func in _FLIPS and out.dim() == 2:
            swaps = len(args) < 3 or args[1] % 2 != args[2] % 2
            flipped = known.flipped != swaps
            self._remember(out, _Known(known.name, flipped, known.start, known.computed))
        elif func in _PARTS and not known.flipped:
            dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            start = known.start
            for part in out if dim == 0 else ():
                self._remember(part, _Known(known.name, False, start, known.computed))
                start += part.shape[0] if part.dim() == args[0].dim() else 1

    def _what(self, weight: object) -> _Known | None:
        """The parameter that a weight is, or is computed from."""
        if not isinstance(weight, Tensor):
            return None
        if id(weight) in self.known:
            return self.known[id(weight)]
        for _, module in self.modules:
            for key, value in vars(module).items():
                if value is weight:  # set by a hook before the forward
                    for name in (f"{key}_orig", f"{key}_v"):
                        source = module._parameters.get(name)
                        if source is not None and source.shape == weight.shape:
                            first = self.known[id(source)].name
                            return _Known(first, computed=True)
        return None

    def _bias(self, bias: object) -> str | None:
        known = self.known.get(id(bias))
        return known.name if isinstance(bias, Tensor) and known is not None else None

    def _linear(
        self, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Product | None:
        known = self._what(weight)
        if known is None or weight.dim() != 2:
            return None
        return Product(
            known.name, self._bias(bias), "linear", input, out, weight,
            flipped=known.flipped, start=known.start, computed=known.computed,
        )  # fmt: skip

    def _matmul(self, out: Tensor, left: Any, right: Any, bias: Any = None) -> Product | None:
        known = self._what(right)
        if known is None or right.dim() != 2 or self._what(left) is not None:
            return None  # a parameter on the left is a product over the positions
        return Product(
            known.name, self._bias(bias), "linear", left, out, right.t(),
            flipped=not known.flipped, start=known.start, computed=known.computed,
        )  # fmt: skip

    def _convolution(
        self, out: Tensor, places: int, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: object = 1, padding: object = 0, dilation: object = 1, groups: int = 1,
    ) -> Product | None:  # fmt: skip
        known = self._what(weight)
        if known is None or input.dim() != places + 2:
            return None
        dilation = _ints(dilation, places)
        return Product(
            known.name, self._bias(bias), "convolution", input, out, weight, _ints(stride, places),
            _pads(padding, tuple(weight.shape[2:]), dilation), dilation, groups,
            computed=known.computed,
        )  # fmt: skip

    def _transposed(
        self, out: Tensor, places: int, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: object = 1, padding: object = 0, output_padding: object = 0, groups: int = 1,
        dilation: object = 1,
    ) -> Product | None:  # fmt: skip
        known = self._what(weight)
        if known is None or input.dim() != places + 2:
            return None
        cut = _ints(padding, places)
        more = _ints(output_padding, places)
        return Product(
            known.name, self._bias(bias), "transposed", input, out, weight, _ints(stride, places),
            tuple((p, p - extra) for p, extra in zip(cut, more)), _ints(dilation, places), groups,
            computed=known.computed,
        )  # fmt: skip


def _ints(value: object, places: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(int(v) for v in (values * places if len(values) == 1 else values))


def _pads(padding: object, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Pads:
    if padding == "valid":
        padding = 0
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((p, p) for p in _ints(padding, len(kernel)))


def _unguarded(function: Function) -> Any:
    """A composite function of torch whose inner calls the mode sees."""
    guards = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    space = {**function.__globals__, **{guard: lambda *_: False for guard in guards}}
    clone = types.FunctionType(
        function.__code__, space, function.__name__, function.__defaults__, function.__closure__
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone
