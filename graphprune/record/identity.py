"""Which recorded value a tensor is, however the code of a model got hold of it.

The ``id`` of a Python object is not enough: ``as_subclass`` and ``nn.Parameter`` make new objects
of the same values without an op that anyone could see, and ``z.data = t`` gives an old object other
values. Where the values lie decides: the storage, and the place in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where the values of a tensor lie in its storage."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    flags: int  # whether it is read as conjugated or negated


@dataclass(frozen=True)
class Known:
    """What is remembered of a tensor: ``source`` made it."""

    storage: int | None
    place: Place
    source: object


class Identity:
    """The tensors of a recording and what made them."""

    def __init__(self) -> None:
        self._objects: dict[int, Known] = {}
        self._storages: dict[int, dict[Place, Any]] = {}
        self._alive: list[Any] = []  # tensors and storages whose address is a key

    def put(self, tensor: Tensor, source: object) -> None:
        """Remember what made a tensor."""
        with torch._C.DisableTorchFunction():
            storage, place = storage_of(tensor), _place(tensor)
        key = None if storage is None else _key(storage)
        if id(tensor) not in self._objects:
            self._alive.append(tensor)
        if key is not None:
            if key not in self._storages:
                self._storages[key] = {}
                self._alive.append(storage)
            self._storages[key][place] = source
        self._objects[id(tensor)] = Known(key, place, source)

    def find(self, tensor: Tensor) -> Any:
        """What made a tensor, or another with the same values; ``None`` when that is unknown."""
        with torch._C.DisableTorchFunction():
            storage, place = storage_of(tensor), _place(tensor)
        key = None if storage is None else _key(storage)
        known = self._objects.get(id(tensor))
        if known is not None and (known.storage, known.place) == (key, place):
            return known.source
        return self._storages[key].get(place) if key in self._storages else None

    def neighbours(self, tensor: Tensor) -> list[Tensor]:
        """Other tensors in the same storage."""
        key = storage_key(tensor)
        if key not in self._storages:
            return []
        tensors = (other for other in self._alive if isinstance(other, Tensor))
        return [other for other in tensors if storage_key(other) == key]


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory that holds the values of a tensor; ``None`` when it is not of that kind."""
    try:
        storage = tensor.untyped_storage()
        storage.data_ptr()
        return storage
    except (NotImplementedError, RuntimeError):  # sparse, opaque, a class that wraps others
        return None


def _key(storage: Any) -> int:
    """The address; of a storage without memory, that of the storage itself."""
    address: int = storage.data_ptr() or storage._cdata
    return address


def storage_key(tensor: Tensor) -> int | None:
    """A number that tensors with common memory have in common."""
    with torch._C.DisableTorchFunction():
        storage = storage_of(tensor)
    return None if storage is None else _key(storage)


def _place(tensor: Tensor) -> Place:
    if tensor.layout is not torch.strided:
        return Place(id(tensor), tuple(tensor.shape), (), tensor.dtype, 0)
    flags = tensor.is_conj() + 2 * tensor.is_neg()
    shape = tuple(tensor.shape)
    # no step is taken along a single place: pooling rewrites such strides without an op
    stride = tuple(0 if size == 1 else step for size, step in zip(shape, tensor.stride()))
    return Place(int(tensor.storage_offset()), shape, stride, tensor.dtype, flags)
