"""Dimensions whose size a file leaves open, and inputs of other sizes to try it on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.arguments import is_int
from graphprune.deploy.flat import finite_range
from graphprune.errors import InputError

Dynamic = Mapping[str, "int | Mapping[str, int]"] | str | None
_FORMS = (
    "a name with the dimension of every input, {'batch': 0, 'sequence': 1}, or of some, "
    "{'sequence': {'input_ids': 1, 'attention_mask': 1}}; None for none"
)


@dataclass(frozen=True)
class Axis:
    """A size that a file leaves open: its name, and where it stands, as (number of input, dim)."""

    name: str
    places: tuple[tuple[int, int], ...]
    size: int


def find_axes(dynamic: Dynamic, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Axis]:
    """What a user asks to be left open.

    Raises:
        InputError: no such input or dimension, or two sizes under one name.
    """
    if dynamic is None:
        return []
    wanted = {dynamic: 0} if isinstance(dynamic, str) else dynamic
    if not isinstance(wanted, Mapping) or dynamic not in ("batch", wanted):
        raise InputError(f"dynamic must be 'batch', or {_FORMS}; got {dynamic!r}")
    found = [_axis(name, where, names, tensors) for name, where in wanted.items()]
    places = [place for axis in found for place in axis.places]
    if len(set(places)) < len(places):
        raise InputError(f"dynamic names one dimension twice: {dynamic!r}")
    return found


def _axis(name: object, where: object, names: Sequence[str], tensors: Sequence[Tensor]) -> Axis:
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"dynamic holds {name!r}: a name of a size must be a word, as 'batch'")
    if isinstance(where, Mapping):
        places = [_place(name, text, dim, names, tensors) for text, dim in where.items()]
    elif is_int(where):
        places = _everywhere(where, tensors)
    else:
        raise InputError(f"dynamic must be {_FORMS}; got {where!r} for {name!r}")
    if not places:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(names, tensors))
        raise InputError(f"dynamic: no input has a dimension {where!r} for {name!r}: {shapes}")
    sizes = {tensors[number].shape[dim] for number, dim in places}
    if len(sizes) > 1:
        raise InputError(
            f"dynamic: {name!r} stands for different sizes, {sorted(sizes)}: give each a name"
        )
    return Axis(name, tuple(places), sizes.pop())


def _place(
    name: str, text: object, dim: object, names: Sequence[str], tensors: Sequence[Tensor]
) -> tuple[int, int]:
    if text not in names:
        raise InputError(f"dynamic: {name!r} is of an input {text!r}; there are {', '.join(names)}")
    number = names.index(str(text))
    count = tensors[number].dim()
    if not isinstance(dim, int) or not -count <= dim < count:
        raise InputError(f"dynamic: {text!r} has {count} dimensions; got {dim!r} for {name!r}")
    return number, dim % count


def _everywhere(dim: int, tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """A dimension of every input that has it, where it is as large as in the first of these."""
    having = [
        (number, dim % tensor.dim())
        for number, tensor in enumerate(tensors)
        if -tensor.dim() <= dim < tensor.dim()
    ]
    sizes = [tensors[number].shape[place] for number, place in having]
    return [place for place, size in zip(having, sizes) if size == sizes[0]]


def resized(tensors: Sequence[Tensor], axis: Axis, size: int) -> list[Tensor]:
    """The same values, repeated or cut along an axis."""
    found = list(tensors)
    for number, dim in axis.places:
        index = torch.arange(size, device=found[number].device) % axis.size
        found[number] = found[number].index_select(dim, index)
    return found


def redrawn(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Other values: floats as spread as those given, ids in the other order, masks as they are.

    A mask that is turned round hides all from some places, of which nothing is defined.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.flip(-1) if tensor.dim() and len(tensor.unique()) > 2 else tensor
        mean, spread = finite_range(tensor)
        values = mean + spread * torch.randn(tensor.shape, generator=generator)
        return values.to(tensor.device, tensor.dtype)

    return [draw(tensor) for tensor in tensors]


def other_sizes(size: int) -> Iterator[int]:
    """Sizes to try, of which a model may refuse some: it halves them, or has so many places."""
    found = (size + 1, size + 2, size - 1, 2 * size, size // 2, size + 32, size - 32)
    yield from (other for other in dict.fromkeys(found) if other > 0 and other != size)
