"""Which recorded value a tensor is, however the code of a model got hold of it.

The ``id`` of a Python object is not enough: ``as_subclass`` and ``nn.Parameter`` make new objects
of the same values without an op that anyone could see, and ``z.data = t`` gives an old object other
values. Where the values lie decides: the storage, and the place in it.
"""

from __future__ import annotations

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


class Known(NamedTuple):
    """What is remembered of a tensor: ``source`` made it."""

    storage: int | None
    place: Place
    source: object


class Identity:
    """The tensors of a recording and what made them."""

    def __init__(self) -> None:
        self._objects: dict[int, Known] = {}
        self._storages: dict[int, dict[Place, object]] = {}
        self._alive: list[object] = []  # tensors and storages whose address is a key

    def put(self, tensor: Tensor, source: object) -> None:
        """Remember what made a tensor."""
        with torch._C.DisableTorchFunction():
            (storage, key), place = _memory(tensor), _place(tensor)
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
            (_, key), place = _memory(tensor), _place(tensor)
        known = self._objects.get(id(tensor))
        if known is not None and known.storage == key and known.place == place:
            return known.source
        return self._storages[key].get(place) if key in self._storages else None

    def forget(self) -> None:
        """Let all tensors go: what is left of a recording may wait long for the collector."""
        self._objects.clear()
        self._storages.clear()
        self._alive.clear()

    def neighbours(self, tensor: Tensor) -> list[Tensor]:
        """Other tensors in the same storage."""
        key = storage_key(tensor)
        if key not in self._storages:
            return []
        tensors = (other for other in self._alive if isinstance(other, Tensor))
        return [other for other in tensors if storage_key(other) == key]


def _memory(tensor: Tensor) -> tuple[torch.UntypedStorage | None, int | None]:
    """The memory that holds the values of a tensor, if it is of that kind, and its address.

    Of a storage without memory, that of the storage itself.
    """
    try:
        storage = tensor.untyped_storage()
        return storage, storage.data_ptr() or storage._cdata
    except (NotImplementedError, RuntimeError):  # sparse, opaque, a class that wraps others
        return None, None


def storage_key(tensor: Tensor) -> int | None:
    """A number that tensors with common memory have in common."""
    with torch._C.DisableTorchFunction():
        return _memory(tensor)[1]


def _place(tensor: Tensor) -> Place:
    shape, dtype = tensor.shape, tensor.dtype
    if tensor.layout is not torch.strided:
        return Place(id(tensor), shape, (), dtype, 0)
    stride = tensor.stride()
    if 1 in shape:  # no step is taken along a single place: pooling rewrites it without an op
        stride = tuple(0 if size == 1 else step for size, step in zip(shape, stride))
    flags = (dtype.is_complex and tensor.is_conj()) + 2 * tensor.is_neg()
    return Place(int(tensor.storage_offset()), shape, stride, dtype, flags)
