"""The inputs that two models are compared on: those given, and others drawn like them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphprune.record.inputs import Call, resized
from graphprune.verification.models import Models

EXAMPLE = "example inputs"
OTHER_BATCH = "another batch size"
OTHER_VALUES = "other values"
OTHER_SIDE = "another resolution"
Shapes = list[tuple[int, ...] | None]
Draw = Callable[[Tensor, tuple[int, ...], torch.Generator], Tensor]


def given(models: Models, call: Call) -> Call:
    """The example inputs, in the precision of the comparison."""
    call = call.map(
        lambda t: t.to(models.device, models.dtype if t.is_floating_point() else t.dtype)
    )
    return models.ids.both(call)


def alike(models: Models, call: Call) -> list[Call]:
    """Random inputs of the shapes of the example inputs."""
    shapes: Shapes = [tuple(tensor.shape) for tensor in call.tensors()]
    return [drawn(models, call, shapes, draw) for draw in (_normal, _within)]


def others(models: Models, call: Call) -> Iterator[tuple[str, list[Call]]]:
    """Inputs at another batch size and resolution: several draws, for models that refuse some.

    The first are normally distributed, the second lie between the smallest and the largest of the
    given values, the third are the given values, repeated.
    """
    before: Shapes = []
    for name, side in ((OTHER_BATCH, False), (OTHER_SIDE, True)):
        shapes = [resized(tensor, call, batch=True, side=side) for tensor in call.tensors()]
        news = any(new and new != tuple(t.shape) for new, t in zip(shapes, call.tensors()))
        if news and shapes != before:
            before = shapes
            yield (
                name,
                [drawn(models, call, shapes, draw) for draw in (_normal, _within, _repeated)],
            )


def drawn(models: Models, call: Call, shapes: Shapes, draw: Draw) -> Call:
    """Inputs of other shapes: floats are drawn, other values are repeated."""
    generator = torch.Generator().manual_seed(models.seed)
    wanted = iter(shapes)

    def change(tensor: Tensor) -> Tensor:
        shape = next(wanted) or tuple(tensor.shape)
        if tensor.is_meta:  # inferred inputs have no values
            values = torch.zeros(tensor.shape, dtype=tensor.dtype)
        else:
            values = tensor.detach().cpu()
        if tensor.layout is not torch.strided:  # where something stands, such as edges, is given
            values = _repeated(values.to_dense(), shape, generator).to_sparse(layout=tensor.layout)
            dtype = models.dtype if tensor.is_floating_point() else tensor.dtype
            return values.to(models.device, dtype)
        if tensor.is_floating_point():
            return draw(values, shape, generator).to(models.device, models.dtype)
        return _repeated(values, shape, generator).to(models.device)

    call = models.ids.both(call.map(change))
    return call if draw is _repeated else models.ids.drawn(call, generator)


def _normal(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _within(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    finite = values[values.isfinite()].double()
    low, high = (finite.min(), finite.max()) if finite.numel() else (0.0, 1.0)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _repeated(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    for dim, size in enumerate(shape):
        if values.shape[dim] != size and values.shape[dim]:
            index = torch.arange(size) % values.shape[dim]
            values = values.index_select(dim, index)
    return values
