"""What a model costs as a function of how many channels each group keeps.

Every size in a recorded graph is an affine form of the kept counts (a constant, plus positions per
channel times channels, over the groups); costs are sums of products of such forms. They are built
once, by running the counting functions on symbols, and evaluated in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from graphprune.channels.analysis import Analysis
from graphprune.ops.ids import KEPT
from graphprune.ops.views import macs_of
from graphprune.plan.plan import Cost
from graphprune.record.cost import lifetimes, macs, peak_activations

Counts = np.ndarray  # kept channels of every removable group, in the order of the groups


class Sum:
    """A sum of products of forms: what sizes and their products are while costs are built.

    ``terms`` maps the numbers of the forms of a product to its factor; ``full`` is the value when
    all channels stay, by which sums are ordered.
    """

    __slots__ = ("full", "terms")

    def __init__(self, terms: dict[tuple[int, ...], float], full: float) -> None:
        self.terms = terms
        self.full = full

    def __mul__(self, other: Any) -> Sum:
        if not isinstance(other, Sum):
            return Sum({k: v * other for k, v in self.terms.items()}, self.full * other)
        terms: dict[tuple[int, ...], float] = {}
        for one, factor in self.terms.items():
            for two, other_factor in other.terms.items():
                key = tuple(sorted(one + two))
                terms[key] = terms.get(key, 0.0) + factor * other_factor
        return Sum(terms, self.full * other.full)

    __rmul__ = __mul__

    def __add__(self, other: object) -> Sum:
        other = _as_sum(other)
        terms = dict(self.terms)
        for key, factor in other.terms.items():
            terms[key] = terms.get(key, 0.0) + factor
        return Sum(terms, self.full + other.full)

    __radd__ = __add__

    def __lt__(self, other: object) -> bool:
        return self.full < _as_sum(other).full

    def __gt__(self, other: object) -> bool:
        return self.full > _as_sum(other).full


def _as_sum(value: Any) -> Sum:
    return value if isinstance(value, Sum) else Sum({(): float(value)}, float(value))


@dataclass
class Forms:
    """The affine forms of kept counts that the sizes of a model are, each of them once."""

    analysis: Analysis
    rows: list[np.ndarray] = field(default_factory=list)  # constant, then one factor by group
    _known: dict[bytes, int] = field(default_factory=dict)
    _sizes: dict[fx.Node, tuple[object, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.analysis.groups
        self.full = np.array([group.size for group in groups], float)
        self.owner = np.zeros(len(self.analysis.units.frozen), np.int64)  # 0: always stays
        for number, group in enumerate(groups):
            self.owner[group.units] = number + 1

    def number(self, row: np.ndarray) -> int:
        """The number of a form."""
        key = row.tobytes()
        if key not in self._known:
            self._known[key] = len(self.rows)
            self.rows.append(row)
        return self._known[key]

    def size(self, units: Iterable[np.ndarray], length: int) -> Any:
        """How many of ``length`` positions stay; each has a unit in every array of ``units``."""
        seen: set[bytes] = set()
        result: Any = length
        for labels in units:
            owners = self.owner[labels]
            if not owners.any() or labels.tobytes() in seen:
                continue
            seen.add(labels.tobytes())
            row = np.bincount(owners, minlength=len(self.full) + 1).astype(float)
            row[1:] /= self.full
            form = (self.number(row),)
            if result is length:
                result = Sum({form: 1.0}, float(length))
            else:  # every value of one goes with every value of the other
                result = result * Sum({form: 1.0 / length}, 1.0)
        return result

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """The shape of a recorded value: ints, and sums where channels can leave."""
        if node not in self._sizes:
            value = self.analysis.values[node]
            grids: dict[int, list[np.ndarray]] = {}
            for layer in value.layers:
                labels = self.analysis.units.labels[layer.numpy()]
                for dim, extent in enumerate(layer.shape):
                    if extent > 1:
                        grid = np.moveaxis(labels, dim, 0).reshape(extent, -1)
                        grids.setdefault(dim, []).append(self._line(grid))
            self._sizes[node] = tuple(
                self.size(grids[dim], extent) if dim in grids else extent
                for dim, extent in enumerate(value.shape)
            )
        return self._sizes[node]

    def _line(self, grid: np.ndarray) -> np.ndarray:
        """The unit on which each position of a dimension hangs, given the units it meets.

        A position stays if any of them stays; of a whole group, some always do.
        """
        line: np.ndarray = grid[:, 0]
        if (grid == grid[:, :1]).all():
            return line
        always = self.analysis.units.labels[KEPT]
        if (grid == grid[:1]).all():
            return np.full_like(line, always)
        line = line.copy()
        for place, units in enumerate(grid):
            owners, counts = np.unique(self.owner[np.unique(units)], return_counts=True)
            if owners[0] == 0 or (counts == self.full[owners - 1]).any():
                line[place] = always
        return line

    def slots(self) -> dict[str, list[Any]]:
        """The sizes of every parameter and buffer that has dimensions."""
        labels = self.analysis.units.labels
        sizes: dict[str, list[object]] = {}
        for slot in self.analysis.slots:
            units = labels[slot.start : slot.start + slot.size]
            sizes.setdefault(slot.tensor, []).append(self.size((units,), slot.size))
        return sizes

    def matrix(self) -> np.ndarray:
        """All forms, and a last one that is always 1; shape [forms + 1, 1 + groups]."""
        one = np.zeros((1, len(self.full) + 1))
        one[0, 0] = 1
        return np.vstack([*self.rows, one])


@dataclass(frozen=True)
class Polynomials:
    """Several sums of products of forms, evaluated at once."""

    factors: np.ndarray  # [terms]
    places: np.ndarray  # [terms, most forms in a product]
    owners: np.ndarray  # [terms]: which sum a term belongs to
    count: int

    @classmethod
    def of(cls, sums: Sequence[object]) -> Polynomials:
        """From what counting functions returned."""
        terms = [
            (number, key, factor)
            for number, total in enumerate(sums)
            for key, factor in _as_sum(total).terms.items()
        ]
        width = max((len(key) for _, key, _ in terms), default=1) or 1
        places = np.full((len(terms), width), -1)
        for row, (_, key, _) in enumerate(terms):
            places[row, : len(key)] = key
        factors = np.array([factor for _, _, factor in terms])
        owners = np.array([number for number, _, _ in terms], np.int64)
        return cls(factors, places, owners, len(sums))

    def values(self, forms: np.ndarray) -> np.ndarray:
        """Every sum, given the values of the forms."""
        products = self.factors * forms[self.places].prod(1)
        if self.count == 1:
            return products.sum(keepdims=True)
        return np.bincount(self.owners, products, self.count)

    def gradient(self, forms: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """The change of the sum of all sums with one more channel of each group: [groups]."""
        taken = forms[self.places]
        slopes = np.zeros(len(forms))
        for column in range(taken.shape[1]):
            rest = self.factors * np.delete(taken, column, 1).prod(1)
            np.add.at(slopes, self.places[:, column], rest)
        return slopes @ matrix[:, 1:]


class Costs:
    """Costs of a model by the kept counts of its groups.

    ``quantities`` are ``"macs"``, ``"params"``, ``"bytes"`` and ``"memory"``.
    """

    def __init__(self, analysis: Analysis, quantities: Iterable[str]) -> None:
        self.analysis = analysis
        self.forms = Forms(analysis)
        self.full = self.forms.full.copy()
        makers: Mapping[str, Callable[[], Any]] = {
            "macs": lambda: Polynomials.of([_macs(self.forms)]),
            "params": lambda: Polynomials.of([_weights(self.forms, params=True)]),
            "bytes": lambda: Polynomials.of([_weights(self.forms, params=False)]),
            "memory": self._lifetimes,
        }
        self.parts: dict[str, Polynomials] = {name: makers[name]() for name in quantities}
        self.matrix = self.forms.matrix()

    def sizes(self, counts: Counts) -> np.ndarray:
        """The values of all forms."""
        return self.matrix[:, 0] + self.matrix[:, 1:] @ counts

    def of(self, counts: Counts) -> dict[str, float]:
        """Every quantity."""
        sizes = self.sizes(counts)
        return {name: self._one(name, part.values(sizes)) for name, part in self.parts.items()}

    def gradient(self, name: str, counts: Counts) -> np.ndarray:
        """What one channel of each group adds to a quantity: [groups]. Not for memory."""
        return self.parts[name].gradient(self.sizes(counts), self.matrix)

    def exact(self, name: str, alive: np.ndarray) -> float:
        """A quantity of a plan, from the shapes of all values: slow, and right for any plan."""
        if name == "memory":
            return peak(self.analysis, alive)
        return float(getattr(cost(self.analysis, alive), name))

    def _one(self, name: str, values: np.ndarray) -> float:
        if name == "latency":
            return float(values[0])  # milliseconds; all else is whole numbers
        if name != "memory":
            return float(np.rint(values[0]))
        change = np.zeros(self.ends.max() + 2)
        np.add.at(change, self.starts, values)
        np.subtract.at(change, self.ends + 1, values)
        return float(np.cumsum(change).max())

    def _lifetimes(self) -> Polynomials:
        lives = lifetimes(self.analysis.records[0])
        self.starts = np.array([life.first for life in lives], np.int64)
        self.ends = np.array([life.last for life in lives], np.int64)
        sizes = [
            math.prod(self.forms.shape(life.node)) * life.node.meta["dtype"].itemsize
            for life in lives
        ]
        return Polynomials.of(sizes)


def _macs(forms: Forms) -> Any:
    return sum(macs_of(node, forms.shape) for node in forms.analysis.records[0].ops)


def _weights(forms: Forms, params: bool) -> Any:
    sizes = forms.slots()
    total: Any = 0
    for name, (shape, width, parameter) in forms.analysis.shapes.items():
        weight = int(parameter) if params else width
        if 0 not in shape:
            total = total + math.prod(sizes.get(name, ())) * weight
    return total


def cost(analysis: Analysis, alive: np.ndarray | None = None) -> Cost:
    """Parameters, MACs and bytes of a model, or of what a plan leaves of it."""
    params = size = 0
    left: dict[str, list[int]] = {}
    for slot in analysis.slots:
        keep = slot.size
        if alive is not None:
            keep = int(alive[slot.start : slot.start + slot.size].sum())
        left.setdefault(slot.tensor, []).append(keep)
    for name, (shape, width, parameter) in analysis.shapes.items():
        count = 0 if 0 in shape else math.prod(left.get(name, ()))
        params += count * parameter
        size += count * width
    first = analysis.records[0]
    if alive is None:
        return Cost(params, macs(first), size)
    return Cost(params, macs(first, analysis.pruned(alive).shape), size)


def peak(analysis: Analysis, alive: np.ndarray) -> int:
    """The peak of activation memory that a plan leaves, in bytes."""
    pruned = analysis.pruned(alive)

    def size(node: fx.Node) -> int:
        return math.prod(pruned.shape(node)) * node.meta["dtype"].itemsize

    return peak_activations(analysis.records[0], size)
