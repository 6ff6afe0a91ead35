"""Functions of tensors that ONNX has and torch has not, as the graph calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.deploy.reading.numbers import END


def div(a: Any, b: Any) -> Any:
    """A quotient, rounded towards zero between whole numbers."""
    whole = all(
        not x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, int) for x in (a, b)
    )
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def reshape(x: Tensor, sizes: Sequence[Any]) -> Tensor:
    """Another shape; a size of 0 stays as it is."""
    return x.reshape([x.shape[dim] if size == 0 else size for dim, size in enumerate(sizes)])


def expand(x: Tensor, sizes: Sequence[Any]) -> Tensor:
    """Repeated along dimensions of size 1, in either of both shapes."""
    x = x[(None,) * (len(sizes) - x.dim())]
    sizes = [1] * (x.dim() - len(sizes)) + list(sizes)
    return x.expand(
        [-1 if size == 1 or before != 1 else size for before, size in zip(x.shape, sizes)]
    )


def part(x: Tensor, starts: Sequence[Any], ends: Sequence[Any], axes: Sequence[int],
         steps: Sequence[int]) -> Tensor:  # fmt: skip
    """Slices along axes; a negative step turns round."""
    for axis, start, end, step in zip(axes, starts, ends, steps):
        if step < 0:
            x, start, end = x.flip(axis), *_turned(x.shape[axis], start, end)
        first = None if start is None or start <= -END else min(start, END)
        last = None if end is None or end >= END else max(end, -END)
        index = [slice(None)] * x.dim()
        index[axis] = slice(first, last, None if abs(step) == 1 else abs(step))
        x = x[tuple(index)]
    return x


def _turned(size: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """The same places counted from the other side; what lies outside is brought to the edge."""
    if start < 0:
        first = 0 if start == -1 else min(-1 - start, size - 1)
    else:
        first = 0 if start >= END else max(size - 1 - start, 0)
    if end < 0:
        return first, -1 - end  # beyond the size: to the end
    return first, 0 if end >= END else max(size - 1 - end, 0)


def full(sizes: Sequence[Any], value: float, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor of one value, where the inputs are."""
    return torch.full(list(sizes), value, dtype=dtype, device=like.device)


def count(start: Any, limit: Any, step: Any, like: Tensor) -> Tensor:
    """Numbers in a row, where the inputs are."""
    return torch.arange(start, limit, step, device=like.device)


def gather(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Slices along an axis by an index of any shape."""
    places: list[Any] = [slice(None)] * x.dim()
    places[axis] = index.long()
    return x[tuple(places)]


def gather_nd(x: Tensor, index: Tensor) -> Tensor:
    """Elements or slices by tuples of indices."""
    return x[tuple(index.unbind(-1))]


def scatter_nd(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy with other elements or slices at tuples of indices."""
    return x.index_put(tuple(index.unbind(-1)), values)


def global_mean(x: Tensor) -> Tensor:
    """The mean over all but batch and channels."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


def global_max(x: Tensor) -> Tensor:
    """The maximum over all but batch and channels."""
    return x.amax(list(range(2, x.dim())), keepdim=True)


def flatten(x: Tensor, axis: int) -> Tensor:
    """A matrix: dimensions before an axis, and the others."""
    if axis in (0, x.dim()):
        return x.reshape((1, -1) if axis == 0 else (-1, 1))
    return x.flatten(axis) if axis == 1 else x.flatten(axis).flatten(0, axis - 1)


def pad(x: Tensor, pads: Sequence[Any], mode: str, value: float, axes: Sequence[int]) -> Tensor:
    """Padding as ONNX lists it: all beginnings, then all ends, of ``axes``."""
    begin, end = pads[: len(axes)], pads[len(axes) :]
    by_axis = {axis % x.dim(): (b, e) for axis, b, e in zip(axes, begin, end)}
    lowest = min((axis for axis, (b, e) in by_axis.items() if b != 0 or e != 0), default=None)
    if lowest is None:
        return x
    flat = [size for axis in range(x.dim() - 1, lowest - 1, -1) for size in by_axis.get(
        axis, (0, 0))]  # fmt: skip
    return F.pad(x, flat, mode, value) if mode == "constant" else F.pad(x, flat, mode)


def same_pad(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
             upper: bool, value: float) -> Tensor:  # fmt: skip
    """Padding after which a window gives ``size / stride`` outputs, rounded up."""
    flat: list[Any] = []
    for size, k, s, d in zip(reversed(x.shape), *map(reversed, (kernel, stride, dilation))):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less = total // 2
        flat += [less, total - less] if upper else [total - less, less]
    return F.pad(x, flat, "constant", value)


def softmax_of_matrix(x: Tensor, axis: int, log: bool) -> Tensor:
    """Softmax as until opset 12: over all dimensions from an axis on."""
    flat = x.flatten(axis)
    found = flat.log_softmax(-1) if log else flat.softmax(-1)
    return found.reshape(x.shape)


def blocks_to_space(x: Tensor, block: int, columns_first: bool) -> Tensor:
    """Channels to places of an image."""
    if columns_first:
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


def space_to_blocks(x: Tensor, block: int) -> Tensor:
    """Places of an image to channels."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


def thresholded(x: Tensor, alpha: float) -> Tensor:
    """Zero up to a bound."""
    return F.threshold(x, alpha, 0.0)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """A sigmoid of straight lines."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def prelu(x: Tensor, slope: Any) -> Tensor:
    """What is negative times a slope."""
    return torch.relu(x) - slope * torch.relu(-x)


def norm_of_one(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    """The sum of absolute values."""
    return x.abs().sum(axes, keepdim=keepdim)


def norm_of_two(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    """The Euclidean norm."""
    return torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim)


def sum_of_squares(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    """The sum of squares."""
    return x.square().sum(axes, keepdim=keepdim)


def scaled(x: Tensor, factor: float) -> Tensor:
    """Times a number."""
    return x if factor == 1.0 else x * factor
