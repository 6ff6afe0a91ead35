"""Refit layer after layer by least squares, so that a small model follows the original.

Both models run side by side on the calibration batches. Where a layer ends, its weights are moved
by the ridge regression of the difference between the two models on the inputs that the small layer
is given. These inputs, and what else goes into the difference, come from layers that were refitted
before: their errors are made up for. How strongly weights are held is chosen by the error on items
that are held out from the fit in turn, and what does not lower that error is not taken. Then the
layers of a segment may be moved together (joint).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphprune.calibration.items import FOLDS, Folds
from graphprune.calibration.joint import Joint
from graphprune.calibration.layers import Layer, constants, find_layers, slope_of
from graphprune.calibration.memory import rooms
from graphprune.calibration.replay import Replay
from graphprune.calibration.segments import segments
from graphprune.calibration.sums import Errors, Sums, choose, held_out, moments, real, reduced
from graphprune.calibration.wide import Dual, Rows, changes, products
from graphprune.ops.views import norm_of
from graphprune.ranks import Ranks
from graphprune.record.padding import counted

WIDEST = 4096  # inputs up to which a layer is refitted by their second moments
MOST = 5e11  # operations that the second moments of one layer may take
BLOCK = 4096  # inputs of a wider layer that are looked at at once
ROWS_OF_WIDE = 4096
_ROWS = 64  # for each input: more tell nothing new
_LEAST_ROWS = 8192
_EXACT = 1e-12  # of the energy: nothing to repair
_FLAT = 1e-6  # slopes below this fraction of the largest one count as zero


@dataclass(frozen=True)
class Refit:
    """What was done to one layer.

    Attributes:
        layer: the module, or the parameter where the root holds it.
        before, after: the squared error at the end of the layer as a fraction of the variance
            there, on the sampled places; after a joint refit on all places.
        held: the same on items that the refit had not seen, each held out in turn.
        ridge: how strongly the weights were held, as for ``calibrate``; infinite where the bias
            alone was moved.
        note: why it was left alone; empty when it was refitted.
    """

    layer: str
    before: float = 0.0
    after: float = 0.0
    held: float = 0.0
    ridge: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How layers are refitted; see ``calibrate``."""

    weights: bool = True
    ridge: float | None = None
    rows: int = 1 << 17
    sweeps: int = 0
    seed: int = 0
    memory: float = math.inf
    seconds: float = math.inf


@dataclass(frozen=True)
class _Known:
    """What a rank with batches tells the others of a layer.

    Attributes:
        keep: which outputs of the original's layer stay; ``None`` where that cannot be told.
        slope: the factor between the output of the layer and where errors count.
        written: whether its input is written to before it is complete.
        batches: how many it was computed for.
    """

    keep: Tensor | None
    slope: Tensor
    written: bool
    batches: int


@dataclass(frozen=True)
class _Seen:
    """Places of one batch at the end of a layer, sorted by the part of the items they belong to.

    Attributes:
        input: of the layer.
        pick: numbers of the places.
        parts: of the items, [places].
        goal, gap: what the original has there, and how far the small model is from it.
        errors: the same at the output of the layer, [places, groups, outputs].
    """

    input: Tensor
    pick: Tensor
    parts: Tensor
    goal: Tensor
    gap: Tensor
    errors: Tensor


class Repair:
    """One pass of refitting over two models that run side by side.

    Args:
        original, small: the two models on the batches.
        kept: which slices of the original's tensors the small model has.
        folds: the parts of the items of the batches that both run on.
        masks: of each batch, which positions are no padding.
        settings: how.
        ranks: which have other batches.
    """

    def __init__(
        self,
        original: Replay,
        small: Replay,
        kept: Mapping[str, Mapping[int, Tensor]],
        folds: Folds,
        masks: Sequence[Tensor | None],
        settings: Settings,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.original, self.small, self.kept = original, small, kept
        self.folds, self.masks, self.settings = folds, masks, settings
        self.weights = settings.weights
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.folds.seeds]
        self.nodes = small.reference
        self.numbers = {node: number for number, node in enumerate(self.nodes)}
        self.constant = constants(self.nodes)
        self.layers, self.others = find_layers(self.nodes, small.tensors)
        self.orders = torch.Generator().manual_seed(settings.seed)
        alike = all(run.like(self.nodes) for run in (*original.runs, *small.runs))
        joint = settings.sweeps > 0 and all(ranks.share(alike))
        self.segments = dict(segments(original, small, self.layers)) if joint else {}
        self.active: list[int] = []
        self.steps: list[list[tuple[Tensor, Tensor]]] = []  # what was changed, and its old values
        self.deadline = time.monotonic() + settings.seconds

    def run(self, tick: Callable[[], None] = lambda: None) -> list[Refit]:
        """Go through the layers once; ``tick`` is called after each."""
        held: dict[int, int] = {}
        for layer in self.layers:
            inside = (layer.node, *layer.chain)
            read = [self.numbers[s] for n in inside for s in self.nodes[n].all_input_nodes]
            segment = self.segments.get(layer)
            for number in (*inside, *read, *(segment.inputs if segment else ())):
                held[number] = max(held.get(number, 0), layer.end)
        self.original.hold(held, {})
        self.small.hold(held, {layer.node: layer.source for layer in self.layers})
        ends = [layer.end for layer in self.layers]
        room = rooms(self.original, self.small, ends, self.settings.memory)
        found = [(number, Refit(name, note=note)) for number, (name, note) in self.others.items()]
        for layer, count in zip(self.layers, room):
            found.append((layer.end, self._at(layer, count)))
            tick()
        return [refit for _, refit in sorted(found, key=lambda pair: pair[0])]

    def _at(self, layer: Layer, count: int) -> Refit:
        """Run the first batches to the end of a layer, and refit it."""
        late = time.monotonic() > self.deadline
        if self.ranks.decided(late) if math.isfinite(self.deadline) else late:
            return Refit(layer.name, note="the time was spent")
        inside = (layer.node, *layer.chain)
        self.active = [
            which
            for which in range(count)
            if self.small.advance(which, layer.end, inside)
            and self.original.advance(which, layer.end, inside)
            and self._corresponds(which, layer)
        ]
        known = [each for each in self.ranks.share(self._known(layer)) if each is not None]
        if not known:
            note = "in no batch do both models compute it for the same rows"
            return Refit(layer.name, note=note)
        refit = self._fit(layer, known)
        if not refit.note:
            self.small.has_moved()
        return self._together(layer, refit, known[0])

    def _known(self, layer: Layer) -> _Known | None:
        """What the batches of this rank tell of a layer; ``None`` without any."""
        if not self.active:
            return None
        written = any(self._written(which, layer) for which in self.active)
        keep = self._kept(layer)
        slope = self._slope(layer)
        if self.ranks.size > 1:
            keep, slope = None if keep is None else keep.cpu(), slope.cpu()
        return _Known(keep, slope, written, len(self.active))

    def _corresponds(self, which: int, layer: Layer) -> bool:
        """Whether row for row the two models compute the same thing in a batch."""
        shapes = [list(m.value(which, layer.end).shape) for m in (self.original, self.small)]
        for shape in shapes:
            del shape[layer.channel_dim]
        if shapes[0] != shapes[1]:
            return False
        original, small = self.original.runs[which], self.small.runs[which]
        if original.choices is None or small.choices is None:
            return True
        pairs = {
            small.nodes[own]: original.nodes[original.place[number]]
            for number, own in small.place.items()
            if number in original.place
        }
        differing = small.choices.differing(original.choices, pairs)
        return self.small.node(which, layer.end) not in differing

    def _fit(self, layer: Layer, known: Sequence[_Known]) -> Refit:
        keep, slope = known[0].keep, known[0].slope.to(self.small.device)
        if keep is None:
            return Refit(layer.name, note="its outputs cannot be told from those of the original")
        if any(each.written for each in known):
            note = "its input is written to before its output is complete"
            return Refit(layer.name, note=note)
        norm = self._norm(layer)
        centred = layer.bias is not None or norm is not None
        if not (centred or self.weights):
            return Refit(layer.name, note="no bias")
        wide = self.weights and layer.columns > WIDEST
        if wide and (layer.window.groups > 1 or self._free(layer) is not None):
            return Refit(
                layer.name, note=f"{layer.columns} inputs in groups, or sparse: too much work"
            )
        batches = sum(each.batches for each in known)
        quota = -(-self._places(layer, wide) // batches)
        seen = list(self._seen(layer, keep.to(self.small.device), slope, quota))
        errors = Errors()
        for part in seen:
            errors.add(part.gap, part.goal)
        errors = reduced({"": errors}, self.ranks)[""]
        if not math.isfinite(errors.error + errors.energy):
            return Refit(layer.name, note="NaN or infinite values behind it")
        if errors.error <= _EXACT * errors.energy:
            return Refit(layer.name, note="equal already")
        solve = self._from_rows if wide else self._from_moments
        ridge, gain, change, shift, reached = solve(layer, seen, slope, centred)
        ridge, gain, reached = self.ranks.decided((ridge, gain, reached))
        self.ranks.copy_from(0, [change, shift])
        before = errors.relative
        doubted = gain > -self.folds.doubt * errors.error and reached > 0  # all items decide
        if not (gain > 0 or doubted):
            note = "a refit would not lower the error of items held out from it"
            return Refit(layer.name, before, before, note=note)
        self._remember((layer.weight, layer.bias, *(norm or ())))
        self._move(layer, change)
        self._shift(layer, shift.reshape(-1) if centred else None, norm)
        after, held = (max(before - lower / errors.energy, 0.0) for lower in (reached, gain))
        return Refit(layer.name, before, after, held, ridge)

    def _slope(self, layer: Layer) -> Tensor:
        reads = {n for number in layer.chain for n in self.nodes[number].all_input_nodes}
        first = self.active[0]
        tensors = {
            node: self.small.value(first, self.numbers[node])
            for node in reads
            if self.constant[node]
        }
        return slope_of(layer, self.nodes, tensors)

    def _from_moments(
        self, layer: Layer, seen: Sequence[_Seen], slope: Tensor, centred: bool
    ) -> tuple[float, float, Tensor, Tensor, float]:
        """The refit from second moments of the inputs.

        Returns:
            The ridge, by how much the error of items held out and of all falls (second and last),
            and the changes of the weights and of the bias in between.
        """
        count = 2 if layer.columns > WIDEST // 2 else FOLDS
        folds = [Sums() for _ in range(count)]
        device = self.small.device
        for part in seen:
            for number, fold in enumerate(folds):
                where = part.parts % count == number
                if bool(where.any()):
                    fold.count += int(where.sum())
                    rows = self._rows(layer, part, part.pick[where])
                    fold.read(rows, part.errors[where], self.weights)
        sums = reduced({n: fold for n, fold in enumerate(folds) if fold.count}, self.ranks, device)
        folds = [sums[number] for number in sorted(sums)]
        free = self._free(layer)

        def refit(ridge: float, shifted: bool) -> Callable[[Sums], tuple[Tensor, Tensor]]:
            return lambda sums: sums.solve(ridge, shifted, self.weights, free)

        def gain(ridge: float, shifted: bool) -> float:
            if len(folds) < 2:  # nothing can be held out
                lower = folds[0].gain(*refit(ridge, shifted)(folds[0]), slope)
                return self.ranks.decided(lower)
            return held_out(folds, slope, refit(ridge, shifted), self.ranks)

        ridge, shifted, found = choose(gain, self.settings.ridge, centred, self.weights)
        total = Sums.of(folds)
        change, shift = refit(ridge, shifted)(total)
        return ridge, found, change, shift, total.gain(change, shift, slope)

    def _from_rows(
        self, layer: Layer, seen: Sequence[_Seen], slope: Tensor, centred: bool
    ) -> tuple[float, float, Tensor, Tensor, float]:
        """The refit of a layer with very many inputs, from products of rows; as above."""

        def blocks() -> Iterator[Tensor]:
            taps = math.prod(layer.window.kernel)
            step = max(BLOCK // taps, 1)
            for start in range(0, 0 if seen else layer.columns, step * taps):
                yield nothing.new_zeros(0, min(step * taps, layer.columns - start))
            for channels in zip(*(p.input.split(step, layer.channel_dim) for p in seen)):
                rows = [layer.window.rows(x, part.pick) for x, part in zip(channels, seen)]
                yield real(torch.cat(rows))[:, 0]

        nothing = real(self.small.tensors[layer.weight]).new_zeros(0, len(slope))
        errors = torch.cat([nothing, *(part.errors[:, 0] for part in seen)]).double()
        parts = torch.cat([torch.zeros(0).long(), *(part.parts.cpu() for part in seen)])
        rows = Rows(len(errors), self.ranks)
        errors, parts = rows.of_all(errors), rows.of_all(parts).long()
        made = products(rows.of_all(block) for block in blocks())
        dual = Dual(made, errors, parts.to(errors.device), layer.columns, slope)

        def gain(ridge: float, shifted: bool) -> float:
            return self.ranks.decided(dual.held_out(ridge, shifted))

        ridge, shifted, found = choose(gain, self.settings.ridge, centred, True)
        factors, shift = dual.solve(ridge, shifted)
        own = torch.cat(list(changes(blocks(), factors[rows.own])), 1)[None]
        change = self.ranks.sum(own)
        return ridge, found, change, shift[None], dual.gain(factors, shift)

    def _rows(self, layer: Layer, part: _Seen, pick: Tensor) -> Tensor:
        """What a layer reads at some places, [places, groups, columns]."""
        if not self.weights:
            return part.input.new_zeros(len(pick), layer.window.groups, 1)
        return real(layer.window.rows(part.input, pick))

    def _together(self, layer: Layer, refit: Refit, known: _Known) -> Refit:
        """Refit the layers before this one once more, together with it."""
        segment = self.segments.get(layer)
        if refit.note or segment is None:
            return refit
        assert known.keep is not None  # it was refitted
        keep = known.keep.to(self.small.device)
        self._remember(segment.moved.values(), again=True)
        turns = {which: self.folds.turns[which] for which in self.active}
        joint = Joint(self.original, self.small, segment, keep, turns, self.ranks)
        after = joint.refit(self.settings.sweeps, self.orders)
        return refit if after is None else replace(refit, after=after)

    def _remember(self, names: Iterable[str | None], again: bool = False) -> None:
        """Note what is about to be changed: in a step of its own, or again in the last one."""
        if not again:
            self.steps.append([])
        tensors = [self.small.tensors[name].detach() for name in names if name is not None]
        self.steps[-1] += [(tensor, tensor.clone()) for tensor in tensors]

    def undo(self) -> None:
        """Take the last refit back."""
        for tensor, value in reversed(self.steps.pop()):
            tensor.copy_(value)

    def _written(self, which: int, layer: Layer) -> bool:
        """Whether the input of a layer was written to since the layer has run."""
        known = self.small.version(which, layer.node)
        return self.small.value(which, layer.source)._version != known

    def _kept(self, layer: Layer) -> Tensor | None:
        """Which outputs of the original's layer stay."""
        plain = layer.weight.removesuffix("_orig")  # it may be masked in one of the models alone
        dims = self.kept.get(plain) or self.kept.get(f"{plain}_orig") or {}
        dim = 1 if layer.flipped or layer.window.kind == "transposed" else 0
        first = self.active[0]
        original = self.original.value(first, layer.end)
        small = self.small.value(first, layer.end)
        size = original.shape[layer.channel_dim]
        keep = dims[dim] if dim in dims else torch.arange(size)
        if layer.window.kind == "transposed" and layer.window.groups > 1 and dims:
            before: object = self.original.node(first, layer.node).args[8]
            if before != layer.window.groups:  # whole groups left
                return None
            starts = torch.arange(0, size, size // before)[:, None]
            keep = (starts + dims.get(dim, torch.arange(size // before))).flatten()
        if len(keep) != small.shape[layer.channel_dim] or int(keep.max()) >= size:
            return None
        return keep.to(small.device)

    def _seen(self, layer: Layer, keep: Tensor, slope: Tensor, quota: int) -> Iterator[_Seen]:
        """Sampled places of all batches."""
        scale = torch.where(slope.abs() > _FLAT * slope.abs().max(), 1 / slope, 0.0)
        window = layer.window
        for which in self.active:
            small = self.small.value(which, layer.end)
            original = self.original.value(which, layer.end)
            wanted = original.index_select(layer.channel_dim, keep)
            pick, parts = self._pick(which, layer, small, quota)
            goal = real(window.outputs(wanted, pick))
            gap = goal - real(window.outputs(small, pick))
            errors = gap * scale.reshape(window.groups, -1).to(gap)
            x = self.small.value(which, layer.source)
            yield _Seen(x, pick, parts, goal, gap, errors)

    def _places(self, layer: Layer, wide: bool) -> int:
        """How many places a layer is fitted to, of all batches."""
        columns, groups = layer.columns, layer.window.groups
        if wide:
            return int(min(self.settings.rows, ROWS_OF_WIDE, (MOST / (2 * columns)) ** 0.5))
        most = MOST / (2 * groups * columns**2)
        return int(min(self.settings.rows, max(_ROWS * columns, _LEAST_ROWS), max(most, columns)))

    def _pick(self, which: int, layer: Layer, y: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Numbers of the places of one batch that are looked at, and the parts they are in."""
        places = layer.window.places(y)
        shape = list(y.shape)
        del shape[layer.channel_dim]
        whole = counted(self.masks[which], shape)
        count = places if whole is None else len(whole)
        if count <= quota:
            pick = torch.arange(count)
        else:
            pick = torch.randint(count, (quota,), generator=self.generators[which])
        pick = pick if whole is None else whole[pick]
        parts = self.folds.of(which, pick, places)
        return pick.to(y.device), parts.to(y.device)

    def _free(self, layer: Layer) -> Tensor | None:
        """Which weights may change: zeroes stay, so that a sparse layer stays sparse."""
        weight = self.small.tensors[layer.weight].detach()
        matrix = layer.window.matrix(weight.t() if layer.flipped else weight)
        return None if bool((matrix != 0).all()) else matrix != 0

    def _move(self, layer: Layer, change: Tensor) -> None:
        """Add to the weights."""
        if not self.weights:
            return
        weight = self.small.tensors[layer.weight]
        straight = weight.detach().t() if layer.flipped else weight.detach()
        matrix = layer.window.matrix(straight).double() + change
        moved = layer.window.weight(matrix, straight)
        weight.detach().copy_(moved.t() if layer.flipped else moved)

    def _shift(self, layer: Layer, shift: Tensor | None, norm: tuple[str, ...] | None) -> None:
        """Add to the bias, and compute the layer and its chain anew for all batches.

        A BatchNorm right behind takes the shift, and gets the statistics of what it now reads: the
        model computes the same, and goes on to do so when it is trained.
        """
        if shift is not None and layer.bias is not None:
            bias = self.small.tensors[layer.bias].detach()
            bias.copy_(bias.double() + shift)
            shift = torch.zeros_like(shift)
        self._again((layer.node,))
        if norm is not None and shift is not None:
            self._renorm(layer, shift, norm)
        self._again(layer.chain)

    def _again(self, numbers: tuple[int, ...]) -> None:
        for which in self.active:
            self.small.again(which, numbers)

    def _norm(self, layer: Layer) -> tuple[str, ...] | None:
        """Names of weight, bias, mean and variance of a BatchNorm right behind a layer."""
        node = self.nodes[layer.chain[0]] if layer.chain else None
        norm = None if node is None else norm_of(node)
        if norm is None:
            return None
        names = []
        for part in (norm.weight, norm.bias, norm.mean, norm.var):
            if not isinstance(part, fx.Node) or part.op != "get_attr" or len(part.users) != 1:
                return None
            names.append(str(part.target))
        return tuple(names) if all(name in self.small.tensors for name in names) else None

    def _renorm(self, layer: Layer, shift: Tensor, names: tuple[str, ...]) -> None:
        outputs = [self.small.value(which, layer.node) for which in self.active]
        variance, mean = moments(outputs, shift.device, self.ranks)
        weight, bias, old_mean, old_variance = (self.small.tensors[n].detach() for n in names)
        norm = norm_of(self.nodes[layer.chain[0]])
        assert norm is not None
        slope = weight.double() / (old_variance.double() + norm.eps).sqrt()
        bias.copy_(bias.double() + slope * (shift - old_mean.double() + mean))
        weight.copy_(slope * (variance + norm.eps).sqrt())
        old_mean.copy_(mean)
        old_variance.copy_(variance)
