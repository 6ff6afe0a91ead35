"""Channel ids: index algebra without modules or graphs.

Every slice of every parameter dimension has an integer, its *channel id*. What a value carries
is a tuple of *layers*: int64 tensors with as many dimensions as the value, of size 1 in each
dimension along which they do not vary. A position of the value survives pruning when its id
survives in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

KEPT = 0  # the id of positions that belong to no parameter and always stay

Shape = tuple[int, ...]
Path = tuple[int | str, ...]  # an argument of a call, then indices into it
Layers = tuple[Tensor, ...]
Pairs = Sequence[tuple[Tensor, Tensor]]  # layers whose ids are tied


def varying(layer: Tensor) -> frozenset[int]:
    """The dimensions along which a layer varies."""
    return frozenset(dim for dim, size in enumerate(layer.shape) if size > 1)


def along(ids: Tensor, dim: int, ndim: int) -> Tensor:
    """The layer of ``ndim`` dimensions that carries a vector of ids along ``dim``."""
    shape = [1] * ndim
    shape[dim] = -1
    return ids.reshape(shape)


def compact(full: Tensor) -> Tensor:
    """Shrink to size 1 every dimension along which ``full`` is constant; not where it is empty."""
    for dim in range(full.dim() if full.numel() else 0):
        if full.shape[dim] <= 1:
            continue
        first = full.narrow(dim, 0, 1)
        if full.stride(dim) == 0 or bool((full == first).all()):
            full = first
    return full


def first_along(layer: Tensor, dims: Iterable[int]) -> Tensor:
    """The first places of a layer along ``dims``."""
    for dim in dims:
        if layer.shape[dim] > 1:
            layer = layer.narrow(dim, 0, 1)
    return layer


def spread(layer: Tensor, shape: Sequence[int], dims: Iterable[int] | None = None) -> Tensor:
    """Expand a layer (without memory) to ``shape``, or only along ``dims``."""
    wanted = range(len(shape)) if dims is None else dims
    sizes = list(layer.shape)
    for dim in wanted:
        sizes[dim] = shape[dim]
    return layer.expand(sizes)


def align(layer: Tensor, ndim: int) -> Tensor:
    """Prepend dimensions of size 1, as broadcasting does."""
    return layer.reshape((1,) * (ndim - layer.dim()) + tuple(layer.shape))


def reshape_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Split a reshape into independent blocks of dimensions of equal product."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks


def reshape_layer(layer: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The layer of a value of shape ``old`` after a reshape to ``new``.

    Only the blocks of dimensions along which the layer varies are ever materialised.
    """
    wide = list(layer.shape)
    target = [1] * len(new)
    for before, after in reshape_blocks(old, new):
        if all(layer.shape[dim] == 1 for dim in before):
            continue
        for dim in before:
            wide[dim] = old[dim]
        for dim in after:
            target[dim] = new[dim]
    return compact(layer.expand(wide).reshape(target))


def move_layer(layer: Tensor, shape: Sequence[int], op: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a data-movement op itself on the ids of a value of ``shape``."""
    return compact(op(spread(layer, shape)))


@dataclass(frozen=True)
class Way:
    """One way to keep a grid of ids rectangular.

    Attributes:
        ties: the ids that are tied.
        frozen: the ids that stay.
        aligns: the ties only keep blocks equally large: columns of the blocks may differ.
        reason: why ``frozen`` stays, for reports.
        statistics: whose statistics change, where that is so.
    """

    ties: Pairs = ()
    frozen: tuple[Tensor, ...] = ()
    aligns: bool = False
    reason: object = None
    statistics: object = None


@dataclass(frozen=True)
class Alternatives:
    """Several ways to keep a grid of ids rectangular, of which one must be chosen.

    The one that leaves most units is taken; a ``firm`` first one already when it leaves several.
    Where ways differ in how many dimensions of a weight they cut, the ``lightest`` is taken: the
    one that leaves the fewest weights when half of the units leave.
    """

    ids: Tensor
    ways: tuple[Way, ...]
    firm: bool = False
    lightest: bool = False


@dataclass
class Ties:
    """Which ids live and die together, and which must stay."""

    size: int = 1
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, object]] = field(default_factory=list)

    def fresh(self, count: int) -> Tensor:
        """Allocate ``count`` new ids."""
        ids = torch.arange(self.size, self.size + count)
        self.size += count
        return ids

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two layers position by position, after broadcasting.

        Where only one of them varies, its positions are tied to one of the other.
        """
        if a is b:
            return
        ndim = max(a.dim(), b.dim())
        a, b = align(a, ndim), align(b, ndim)
        for one, other in ((a, b),) if a.shape == b.shape else ((a, b), (b, a)):
            for dim in range(ndim):
                if one.shape[dim] == 1:
                    other = other.narrow(dim, 0, 1)
            one, other = torch.broadcast_tensors(one, other)
            self.left.append(one.reshape(-1))
            self.right.append(other.reshape(-1))

    def freeze(self, ids: Tensor, reason: object) -> None:
        """Ids that must stay, and why."""
        self.frozen.append((ids.reshape(-1), reason))

    def stays(self, layer: Tensor) -> bool:
        """Whether just these ids were frozen already."""
        ids = layer.reshape(-1)
        return any(torch.equal(ids, other) for other, _ in self.frozen)

    def collapse(self, layer: Tensor, dims: Iterable[int]) -> Tensor:
        """Tie everything along ``dims`` and return the layer without them."""
        first = first_along(layer, dims)
        if first is not layer:
            self.tie(first, layer)
        return first

    def components(self, since: int = 0, labels: np.ndarray | None = None) -> np.ndarray:
        """The component label of every id; ``labels`` continues an earlier result."""
        left, right = _flat(self.left[since:]), _flat(self.right[since:])
        if labels is None:
            count, mapped = self.size, (left, right)
        else:
            count, mapped = int(labels.max()) + 1, (labels[left], labels[right])
        merged = connected(*mapped, count)
        return merged if labels is None else merged[labels]


def connected(left: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """The component label of each of ``count`` nodes joined by edges."""
    from scipy.sparse import csr_array  # here: importing graphprune stays quick
    from scipy.sparse.csgraph import connected_components

    order = np.argsort(left, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(left, minlength=count))])
    edges = csr_array((np.ones(len(left), np.int8), right[order], starts), shape=(count, count))
    labels: np.ndarray = connected_components(edges, directed=False)[1]
    return labels


def _flat(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.int64)
