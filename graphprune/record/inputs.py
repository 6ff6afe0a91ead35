"""Example inputs: what the user may pass, and what is tried when nothing is passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, TraceError
from graphprune.record.batches import describe
from graphprune.record.outputs import Outputs

_SIDES = (224, 32, 28, 64, 96, 128, 256, 299, 16, 8, 512)
_VOLUMES = ((16, 112, 112), (16, 224, 224), (8, 32, 32), (16, 16, 16), (4, 8, 8))
_CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass, and which of its outputs count."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: Outputs | None = None  # which outputs count; all

    @classmethod
    def of(cls, example_inputs: object) -> Call:
        """A tensor, a tuple or list of arguments, or a dict of keyword arguments."""
        if isinstance(example_inputs, Call):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            if not all(isinstance(key, str) for key in example_inputs):
                raise InputError("a dict of example_inputs holds keyword arguments: use str keys")
            call = cls((), dict(example_inputs))
        elif isinstance(example_inputs, tuple | list):
            call = cls(tuple(example_inputs))
        else:
            call = cls((example_inputs,))
        if not call.tensors():
            raise InputError(
                f"example_inputs holds no tensor (found {type(example_inputs).__name__}); pass a "
                "tensor, a tuple of positional arguments or a dict of keyword arguments"
            )
        found = [t for t in call.tensors() if t.is_floating_point()] or call.tensors()
        if not any(tensor.numel() for tensor in found):
            raise InputError(
                f"example_inputs hold no elements (found {call}): torch takes shortcuts for such "
                "tensors, and nothing can be seen of the layers; pass a batch of at least one"
            )
        return call

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor changed."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def on(self, device: str | torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh copies of the arguments on a device."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.is_meta:  # inferred inputs have no values
                return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            return tensor.detach().to(device, copy=True)

        call = self.map(move)
        return call.args, call.kwargs

    def tensors(self) -> list[Tensor]:
        """All tensors of the call, in order."""
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def repeated(self, times: int) -> Call:
        """The same inputs with the batch dimension repeated."""
        return self.map(lambda t: t.repeat(times, *[1] * (t.dim() - 1)) if t.dim() else t)

    def another_batch(self) -> Call:
        """Inputs without values, each with one more along its first dimension."""
        return self.map(
            lambda t: t.new_empty((t.shape[0] + 1, *t.shape[1:]), device="meta") if t.dim() else t
        )

    def __str__(self) -> str:
        """The shapes, for messages."""
        named = (f"{key}={describe(value)}" for key, value in self.kwargs.items())
        return ", ".join([*map(describe, self.args), *named])


def parameter_names(model: nn.Module) -> list[str]:
    """The names of the positional arguments of a model."""
    try:
        signature = inspect.signature(type(model).forward)
    except (TypeError, ValueError):
        return []
    return [p.name for p in signature.parameters.values() if p.kind in _NAMED][1:]


def candidates(model: nn.Module) -> Iterator[Call]:
    """Usual inputs: those of the first layer, on meta, and ids where the forward names them."""
    yield from _of_first_layer(model)
    names = [name for name in parameter_names(model) if name.endswith("input_ids")]
    if names:  # of encoder and decoder, say
        yield Call((), dict.fromkeys(names, torch.zeros((1, 16), dtype=torch.long)))


def _of_first_layer(model: nn.Module) -> Iterator[Call]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def zeros(*shape: int) -> Call:
        return Call((torch.empty(shape, dtype=dtype, device="meta"),))

    for module in model.modules():
        for spatial, kinds in _CONVOLUTIONS.items():
            if isinstance(module, kinds):
                channels = module.in_channels
                for shape in _VOLUMES if spatial == 3 else ((side,) * spatial for side in _SIDES):
                    yield zeros(1, channels, *shape)
                return
        if isinstance(module, nn.Linear):
            yield zeros(1, module.in_features)
            yield zeros(1, 16, module.in_features)
            return
        if isinstance(module, nn.Embedding):
            yield Call((torch.zeros((1, 16), dtype=torch.long, device="meta"),))
            yield Call((torch.zeros((1,), dtype=torch.long, device="meta"),))
            return


def infer(model: nn.Module, runs: Callable[[Call], object]) -> tuple[Call, Any]:
    """The first usual input on which the model runs, and what ``runs`` returned for it."""
    tried, error = [], None
    for call in candidates(model):
        try:
            return call, runs(call)
        except TraceError as failure:
            tried.append(str(call))
            error = failure
    raise InputError(
        f"could not infer example inputs for {type(model).__name__}"
        + (f" (tried {'; '.join(tried)})" if tried else " (no convolution, linear or embedding)")
        + ": pass example_inputs=, a tensor, a tuple or a dict of keyword arguments"
    ) from error


def called(example_inputs: object, runs: Callable[[Call], object]) -> tuple[Call, Any]:
    """Example inputs as the model takes them, and what ``runs`` returned for them.

    A list of tensors holds arguments, or is one (images of different sizes, for a detector).
    """
    call = Call.of(example_inputs)
    try:
        return call, runs(call)
    except TraceError as error:
        if not isinstance(example_inputs, tuple | list | Tensor):
            raise
        if len(call.tensors()) < len(call.args):
            raise
        whole = Call(([*call.args],))
        try:
            found = runs(whole)
        except TraceError:
            found = None
        if found is None:
            raise
        if isinstance(example_inputs, Tensor):
            raise TraceError(
                "the model runs on a list of such tensors, not on the tensor itself: pass "
                f"example_inputs=[image] ({error})"
            ) from error
        return whole, found


def resized(tensor: Tensor, call: Call, batch: bool, side: bool) -> tuple[int, ...] | None:
    """The shape at another batch size, and at another resolution for image-like floats."""
    shape = list(tensor.shape)
    sizes = {t.shape[0] for t in call.tensors() if t.dim()}
    if batch and shape and len(sizes) == 1:
        shape[0] += 1
    if side:
        if tensor.dim() < 4 or not tensor.is_floating_point():
            return None if not tensor.is_floating_point() else tuple(shape)
        for dim in range(tensor.dim() - 2, tensor.dim()):
            shape[dim] = _other_side(shape[dim])
    return tuple(shape)


def _other_side(side: int) -> int:
    """A smaller side for large images, a larger one for small images."""
    return side // 64 * 32 if side >= 128 else side + 8
