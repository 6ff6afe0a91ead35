"""The error that remains when the reading layers are refitted without a channel.

What a layer reads is summed up by the second moments of its input windows, and what its output is
worth by the second moments of the gradients with respect to it. With both, the loss of every
channel after the best refit of the others is known in closed form, and channels are removed one
after the other, the cheapest first. What they cost is read off a half of the items that the refit
has not seen (``held``): with fewer rows than channels every channel is redundant in the rows seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.channels.analysis import Group
from graphprune.criteria.activations import reading_dim
from graphprune.criteria.evidence import Collector, Evidence, Key, Slots, register_statistic
from graphprune.criteria.held import Halves, held_out
from graphprune.criteria.registry import Unseen, register_criterion
from graphprune.ranks import Ranks
from graphprune.record.batches import forward
from graphprune.record.observe import Product
from graphprune.record.padding import unpadded
from graphprune.record.windows import Window

WIDEST = 2560  # columns (channels x kernel) up to which all second moments are kept
ROWS = 8192  # windows that are looked at of each batch
STREAMS = 30.0  # how much more errors in streams may count: they reach all that is behind
LATER = -1.0  # what the power of e by which late errors count more may be less or more
FEWEST = 8  # rows that a half tells anything from
PLAIN = 1e-4  # the ridge where nothing can be held out
_SUMS = ("moment", "total", "count", "metric")  # fields of a reader that add up
STEPS = 256  # channels of large groups leave several at a time


@dataclass
class Reader:
    """Second moments of what a weight reads, and of the gradients of what it writes.

    With windows of n columns, in a convolution of b groups:

    Attributes:
        window: how the weight reads.
        value: the weight as it was used.
        index: positions of the channels, [channels, positions each], where only moments between
            channels are kept; ``None`` when all moments are.
        moment, total, count: sums over the windows of each half of the items: [2, b, n, n],
            [2, b, n] and [2].
        metric: sums of the gradients' products, [b, outputs, outputs], or their squares where
            there are very many outputs.
        place: where the weight stands in the order in which weights run, from 0 to 1.
    """

    window: Window
    value: Tensor
    index: Tensor | None
    moment: Tensor | float = 0.0
    total: Tensor | float = 0.0
    count: Tensor | float = 0.0
    metric: Tensor | float = 0.0
    place: float = 0.0

    def read(
        self, x: Tensor, places: int, counted: Tensor | None, generator: torch.Generator
    ) -> None:
        """Add the windows of one batch, those of every other item to the second half.

        Args:
            x: what the weight reads.
            places: how many windows there are.
            counted: numbers of those that count; ``None``: all of them.
            generator: of the choice, where there are very many.
        """
        items = x.shape[0] if x.dim() > 1 else 1
        if self.index is not None:  # kernel places and positions of a channel are alike
            dim = -1 if self.window.kind == "linear" else 1
            channels, positions = self.index.shape
            x = x.movedim(dim, -1)[..., self.index.to(x.device)].movedim(-2, -1)
            rows = x.reshape(-1, 1, channels)
            places = len(rows)
            if counted is not None:
                counted = (counted[:, None] * positions + torch.arange(positions)).flatten()
            pick = _some(places, ROWS * positions, counted, generator)
            rows = rows[pick.to(x.device)]
        else:
            pick = _some(places, ROWS, counted, generator)
            rows = self.window.rows(x, pick.to(x.device))
        halves = [real(rows[h.to(x.device)]).transpose(0, 1) for h in _halves(pick, places, items)]
        for name, sums in (
            ("moment", [half.mT @ half for half in halves]),
            ("total", [half.sum(1) for half in halves]),
            ("count", [torch.tensor(half.shape[1]) for half in halves]),
        ):
            more = torch.stack([part.to("cpu", torch.float64) for part in sums])
            setattr(self, name, getattr(self, name) + more)

    def blank(self) -> Reader:
        """The same reader before it has read anything."""
        return Reader(self.window, self.value.cpu(), self.index)

    def write(self, gradient: Tensor) -> None:
        """Add the gradients of one batch."""
        rows = real(self.window.outputs(gradient)).transpose(0, 1)
        wide = rows.shape[-1] > WIDEST
        found = rows.square().sum(1) if wide else rows.mT @ rows
        self.metric = self.metric + found.to("cpu", torch.float64)

    def covariance(self, half: int | None = None) -> Tensor:
        """Of the columns, [b, n, n], of a half or of all: a constant is left to a bias."""
        parts = [torch.as_tensor(part) for part in (self.moment, self.total, self.count)]
        moment, total, count = (p.sum(0) if half is None else p[half] for p in parts)
        mean = total / count
        return moment / count - mean[:, :, None] * mean[:, None, :]

    @property
    def halves(self) -> tuple[Tensor, Tensor] | None:
        """The covariance of each half of the items; ``None`` where one half has very few rows."""
        if float(torch.as_tensor(self.count).min()) < FEWEST:
            return None
        return self.covariance(0), self.covariance(1)

    def weighed(self) -> Tensor | None:
        """The weight in units of the outputs' worth, [b, rows, n]; ``None``: worth nothing."""
        if not isinstance(self.metric, Tensor) or not isinstance(self.count, Tensor):
            return None
        matrix = self.window.matrix(self.value.detach()).to("cpu", torch.float64)
        if self.metric.dim() == 2:
            matrix = self.metric.sqrt()[:, :, None] * matrix
        else:
            values, vectors = torch.linalg.eigh(self.metric)
            matrix = values.clamp_min(0).sqrt()[:, :, None] * (vectors.mT @ matrix)
        if self.index is not None:
            channels = len(self.index)
            taps = self.value[0, 0].numel()
            parts = matrix.reshape(1, matrix.shape[1], -1, taps)[:, :, self.index]
            matrix = parts.permute(0, 1, 3, 4, 2).reshape(1, -1, channels)
        return matrix

    def columns(self, index: Tensor) -> Tensor:
        """The columns of every channel of a group, [channels, columns each]."""
        if self.index is not None:
            place = torch.full((int(self.index.max()) + 1,), -1)
            place[self.index[:, 0]] = torch.arange(len(self.index))
            return place[index[:, :1]]
        taps = self.value[0, 0].numel()
        return (index[:, :, None] * taps + torch.arange(taps)).flatten(1)


def real(x: Tensor) -> Tensor:
    """Detached, in single or double precision."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _halves(pick: Tensor, places: int, items: int) -> tuple[Tensor, Tensor]:
    """Which of some places belong to items of even number, and which to the others."""
    told = items > 1 and places % items == 0  # otherwise two stretches
    item = pick * (items if told else 2) // max(places, 1)
    return (item % 2 == 0).nonzero()[:, 0], (item % 2 == 1).nonzero()[:, 0]


def _some(count: int, most: int, counted: Tensor | None, generator: torch.Generator) -> Tensor:
    """Numbers below ``count`` that count: all, or as many as ``most`` drawn at random."""
    count = count if counted is None else len(counted)
    few = count <= most
    pick = torch.arange(count) if few else torch.randint(count, (most,), generator=generator)
    return pick if counted is None else counted[pick]


@register_statistic("reconstruction")
class Reconstructions(Collector):
    """Second moments on both sides of what reads a group: ``{(tensor, dim): {row: Reader}}``.

    Unless the user passes a loss, gradients are those of a random sum of all outputs: their second
    moments weigh an error by what it does to the outputs (Gauss-Newton with the unit metric), which
    works for trained networks whose loss has no gradient left.
    """

    backward = True

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        super().__init__(model, slots)
        self.found: dict[Key, dict[int, Reader]] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.seen: dict[tuple[Key, int], int] = {}  # in which batch each first ran

    def begin(self, number: int) -> None:
        """Draw what is drawn for a batch from its number: it may be on any rank."""
        super().begin(number)
        self.generator.manual_seed(number)

    def loss(self, model: nn.Module, batch: object) -> Tensor:
        """A random sum of all outputs but those of padding."""
        out = forward(model, batch)
        known = isinstance(out, Tensor | tuple | list | dict)
        total = None
        for leaf in pytree.tree_leaves(out if known else vars(out)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point():
                weights = torch.randn(leaf.shape, generator=self.generator).to(leaf)
                part = unpadded(leaf * weights, self.mask).sum()
                total = part if total is None else total + part
        return torch.zeros(()) if total is None else total

    def product(self, product: Product) -> None:
        """Add what a product reads, and have its gradient added when it is there."""
        key = (product.weight, reading_dim(product))
        complex_or_split = product.value.is_complex() or (
            product.kind == "transposed" and product.groups > 1
        )
        if key not in self.slots or complex_or_split or not product.output.requires_grad:
            return
        parts = self.found.setdefault(key, {})
        if product.start not in parts:
            reader = _reader(product, self.slots[key])
            if reader is None:
                return
            parts[product.start] = reader
            self.seen[key, product.start] = self.number
        reader = parts[product.start]
        places, counted = reader.window.places(product.output), self.counted(product)
        if self.mask is not None and self.mask.numel() != places:
            counted = None
        reader.read(product.input.detach(), places, counted, self.generator)
        product.output.register_hook(reader.write)

    def reduce(self, ranks: Ranks) -> bool:
        """Sums over the ranks, in the order in which one process would first meet each."""
        own = {(k, start): r for k, parts in self.found.items() for start, r in parts.items()}
        readers = ranks.union({place: reader.blank() for place, reader in own.items()})
        sums = {(p, n): getattr(r, n) for p, r in own.items() for n in _SUMS}
        sums = {place: part for place, part in sums.items() if isinstance(part, Tensor)}
        for (place, name), total in ranks.sums(sums).items():
            setattr(readers[place], name, total)
        first: dict[tuple[Key, int], tuple[int, int]] = {}
        for met in ranks.share({p: (self.seen[p], n) for n, p in enumerate(own)}):
            for place, turn in met.items():
                first[place] = min(turn, first.get(place, turn))
        self.found = {}
        for key, start in sorted(readers, key=first.__getitem__):
            self.found.setdefault(key, {})[start] = readers[key, start]
        return True

    def finish(self, batches: int) -> dict[Key, dict[int, Reader]]:
        """Moments and metrics; the metric is a mean over the batches."""
        readers = [reader for parts in self.found.values() for reader in parts.values()]
        for number, reader in enumerate(readers):  # in the order in which they first ran
            reader.place = number / max(len(readers) - 1, 1)
            reader.metric = reader.metric / batches
        return self.found


def _reader(product: Product, indices: Sequence[Tensor]) -> Reader | None:
    """Empty moments for a product; ``None`` where they cannot be kept."""
    window = Window.of(product)
    taps = product.value[0, 0].numel()
    if window.matrix(product.value).shape[-1] <= WIDEST:
        return Reader(window, product.value.detach(), None)
    if product.groups > 1 or len({index.shape[1] for index in indices}) > 1:
        return None
    index = torch.cat(list(indices))
    fits = len(index) <= WIDEST and taps >= 1
    return Reader(window, product.value.detach(), index) if fits else None


@dataclass(frozen=True)
class Reconstruction:
    """The error that remains after the reading layers are refitted: ``reconstruction``.

    Luo et al., "ThiNet", ICCV 2017 choose channels by the error of the next layer, and refit it.
    Here the error is weighed by its effect on the outputs, and the refit and the removal are those
    of the optimal brain surgeon on groups of weights (Hassibi and Stork, NIPS 1992; Kurtic et al.,
    "ZipLM", NeurIPS 2023): the cheapest channel leaves, the inverse moments are brought up to date,
    and the next one is looked for. A score is the increase of the error when the turn of a channel
    comes, smoothed so that it never falls: scores of different groups compare, and with
    ``scope="global"``, ``normalise="macs"`` and a target they distribute a budget.

    Attributes:
        ridge: added to the second moments, as a fraction of their mean; when absent, chosen for
            every layer by the error on items that a refit has not seen, which then is the score.
        late: how much more an error in the last layer counts than the same one in the first, as a
            power of e: a repair makes up for errors of early layers in the layers behind them.
    """

    ridge: float | None = None
    late: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"weights", "reconstruction"})
    comparable: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [channels]."""
        assert isinstance(tensors, Evidence)
        known: Mapping[Key, Mapping[int, Reader]] = tensors.statistics["reconstruction"]
        found: list[Surgeon] = []
        sides: list[Halves] = []
        for member in group.members if group.size else ():
            parts = known.get((member.slot.tensor, member.slot.dim), {}) if member.reads else {}
            for reader in parts.values():
                weighed = reader.weighed()
                if weighed is not None:
                    columns = reader.columns(torch.from_numpy(member.index.copy()))
                    weighed = weighed * math.exp(self.late * reader.place / 2)  # of the root
                    halves = reader.halves if self.ridge is None else None
                    ridge = PLAIN if self.ridge is None else self.ridge
                    if halves is not None:
                        sides.append(Halves(halves, weighed, columns))
                        ridge = sides[-1].ridge()
                    found.append(Surgeon(reader.covariance(), weighed, columns, ridge))
        if not found:
            raise Unseen("no convolution or linear layer of moderate size sums over its channels")
        # what is missing is missing for all readers at once: their errors add up, not their squares
        return eliminate(found, group.size, sides) * len(found)


reconstruction = register_criterion("reconstruction")(Reconstruction())


@dataclass(frozen=True)
class Auto(Reconstruction):
    """What is best known for a repair without training: ``auto``.

    ``reconstruction`` (after Kurtic et al., "ZipLM", NeurIPS 2023), ranked over all groups by the
    error for each MAC that is saved, if the user names no scope and no normalisation. How errors of
    different groups count for the outputs is an estimate: plans try others on a repaired model
    (``variants``). Without data it is ``l2``, and the plan says so.
    """

    late: float = 2.0
    others: ClassVar[tuple[Reconstruction, ...]] = (Reconstruction(ridge=PLAIN),)
    scope: ClassVar[str] = "global"
    normalise: ClassVar[str] = "macs"
    without_data: ClassVar[str] = "l2"

    def variants(
        self, groups: Sequence[Group], tensors: Mapping[str, Tensor]
    ) -> Sequence[Mapping[str, float]]:
        """Factors by group: streams stay longer; early layers do; layers with few rows do not."""
        assert isinstance(tensors, Evidence)
        known: Mapping[Key, Mapping[int, Reader]] = tensors.statistics["reconstruction"]
        streams, late, trust = {}, {}, {}
        for group in groups:
            keys = [(member.slot.tensor, member.slot.dim) for member in group.members]
            places = [reader.place for key in keys for reader in known.get(key, {}).values()]
            writers = [m for m in group.members if m.slot.weight and not m.reads]
            if len(places) > 1 and len(writers) > 1:
                streams[group.name] = STREAMS
            seen = [each.seen() for each in self._halves(group, known)]
            held = sum(others for _, others in seen)
            if held > 0:
                trust[group.name] = max(sum(fitted for fitted, _ in seen) / held, 1e-3)
            if places:
                late[group.name] = math.exp(LATER * sum(places) / len(places))
        return streams, late, trust

    def _halves(self, group: Group, known: Mapping[Key, Mapping[int, Reader]]) -> Iterator[Halves]:
        """What reads a group, in two halves of the items."""
        for member in group.members:
            for reader in known.get((member.slot.tensor, member.slot.dim), {}).values():
                halves, weighed = reader.halves, reader.weighed()
                columns = reader.columns(torch.from_numpy(member.index.copy()))
                if halves is not None and weighed is not None and len(columns) > 1:
                    yield Halves(halves, weighed, columns)


auto = register_criterion("auto")(Auto())


@dataclass
class Surgeon:
    """One weight from which groups of columns are removed, the others being refitted.

    Attributes:
        covariance: of the columns, [b, n, n].
        weight: [b, rows, n]; it is refitted with every removal.
        columns: of each channel that has not left, [channels, columns each].
    """

    covariance: Tensor
    weight: Tensor
    columns: Tensor
    ridge: float
    inverse: Tensor = field(init=False)
    gone: Tensor = field(init=False)  # of the columns that are left in the two, which have left

    def __post_init__(self) -> None:
        size = self.covariance.shape[-1]
        diagonal = self.covariance.diagonal(dim1=-2, dim2=-1)
        level = self.ridge * diagonal.mean(-1) + 1e-12 * (diagonal.amax() + 1e-30)
        unit = torch.eye(size, dtype=torch.float64)
        self.inverse = torch.linalg.inv(self.covariance + level[:, None, None] * unit)
        self.weight = self.weight.clone()
        self.gone = torch.zeros(size, dtype=torch.bool)

    def errors(self, channels: Tensor) -> Tensor:
        """How much the error grows when one of the channels leaves, [channels]."""
        columns = self.columns[channels]
        blocks = self.inverse[:, columns[:, :, None], columns[:, None, :]]
        weights = self.weight[:, :, columns].permute(0, 2, 3, 1)
        solved = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum((0, 2, 3))

    def remove(self, channels: Tensor) -> None:
        """Remove channels together and refit the others."""
        columns = self.columns[channels].flatten()
        block = self.inverse[:, columns[:, None], columns[None, :]]
        update = torch.linalg.solve(block, self.inverse[:, columns])
        for matrix in (self.weight, self.inverse):
            matrix.baddbmm_(matrix[:, :, columns], update, alpha=-1)
        self.gone[columns] = True
        if 4 * int(self.gone.sum()) > len(self.gone):
            self._compact()

    def _compact(self) -> None:
        """Forget the columns that have left."""
        rest = (~self.gone).nonzero()[:, 0]
        place = torch.full((len(self.gone),), -1)
        place[rest] = torch.arange(len(rest))
        self.columns = place[self.columns]
        self.weight = self.weight[:, :, rest].contiguous()
        self.inverse = self.inverse[:, rest][:, :, rest].contiguous()
        self.gone = self.gone[rest]


def eliminate(surgeons: Sequence[Surgeon], size: int, sides: Sequence[Halves] = ()) -> Tensor:
    """The increase of the error when each channel leaves, the cheapest first: [channels].

    Args:
        surgeons: the weights that read the channels.
        size: how many channels there are.
        sides: the same weights in two halves of the items, which errors are then taken from.
    """
    alive = torch.arange(size)
    order: list[int] = []
    costs: list[float] = []
    at_once = -(-size // STEPS)
    while len(alive) > 1:
        errors = torch.stack([surgeon.errors(alive) for surgeon in surgeons]).sum(0)
        count = min(at_once, len(alive) - 1)
        cheapest = errors.argsort(stable=True)[:count]
        order += alive[cheapest].tolist()
        costs += errors[cheapest].clamp_min(0).tolist()
        for surgeon in surgeons:
            surgeon.remove(alive[cheapest])
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[cheapest] = False
        alive = alive[stays]
    if len(sides) == len(surgeons) and order:
        ridges = [surgeon.ridge for surgeon in surgeons]
        given = torch.tensor(costs, dtype=torch.float64)
        costs = held_out(sides, ridges, torch.tensor(order), given).tolist()
    found = torch.zeros(size, dtype=torch.float64)
    slopes = _rising(costs)
    found[order] = slopes
    found[alive] = (slopes[-1] if len(slopes) else 1.0) * 2 + 1e-30
    return found


def _rising(costs: Sequence[float]) -> Tensor:
    """Slopes of the largest convex curve below the sums of the costs, strictly rising."""
    blocks: list[tuple[float, int]] = []  # the mean of a stretch, and its length
    for cost in costs:
        mean, length = cost, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean = (mean * length + before * count) / (length + count)
            length += count
        blocks.append((mean, length))
    slopes = torch.tensor([mean for mean, count in blocks for _ in range(count)])
    ranks = torch.arange(len(costs), dtype=torch.float64) / max(len(costs), 1)
    return slopes.double() * (1 + 1e-6 * ranks) + 1e-30 * ranks
