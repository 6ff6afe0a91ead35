"""Refit layer after layer by least squares, so that a small model follows the original.

Both models run side by side on the calibration batches. Where a layer ends, its weights are moved
by the ridge regression of the difference between the two models on the inputs that the small layer
is given. These inputs, and what else goes into the difference, come from layers that were refitted
before: their errors are made up for. Then the layers of a segment may be moved together (joint).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.calibration.joint import Joint
from graphprune.calibration.layers import Layer, find_layers, slope_of
from graphprune.calibration.replay import Replay, last_uses, same_ops
from graphprune.calibration.segments import segments
from graphprune.calibration.sums import Sums
from graphprune.ops.views import norm_of

WIDEST = 4096  # columns that are refitted at once
_EXACT = 1e-12  # of the energy: nothing to repair
_FLAT = 1e-6  # slopes below this fraction of the largest one count as zero


@dataclass(frozen=True)
class Refit:
    """What was done to one layer.

    Attributes:
        layer: the module, or the parameter where the root holds it.
        before, after: the squared error at the end of the layer as a fraction of the variance
            there, on the sampled places; after a joint refit on all places.
        note: why it was left alone; empty when it was refitted.
    """

    layer: str
    before: float = 0.0
    after: float = 0.0
    note: str = ""


class Repair:
    """One pass of refitting over two models that run side by side."""

    def __init__(
        self,
        original: Replay,
        small: Replay,
        kept: Mapping[str, Mapping[int, Tensor]],
        *,
        weights: bool,
        ridge: float,
        rows: int,
        seed: int,
        sweeps: int = 0,
    ) -> None:
        self.original, self.small, self.kept = original, small, kept
        self.weights, self.ridge = weights, ridge
        self.quota = -(-rows // len(small.values))
        self.generator = torch.Generator().manual_seed(seed)
        self.nodes = small.nodes[0]
        same_ops(original.nodes[0], self.nodes, "in the small model")
        self.layers, self.others = find_layers(self.nodes, small.tensors)
        self.sweeps = sweeps
        self.orders = torch.Generator().manual_seed(seed)
        self.segments = dict(segments(original, small, self.layers)) if sweeps else {}
        self.versions: dict[int, list[int]] = {}

    def run(self, tick: Callable[[], None] = lambda: None) -> list[Refit]:
        """Go through the graph once; ``tick`` is called after every op."""
        starting = {layer.node: layer for layer in self.layers}
        ending: dict[int, list[Layer]] = {}
        held: dict[int, int] = {}
        numbers = {node: number for number, node in enumerate(self.nodes)}
        for layer in self.layers:
            ending.setdefault(layer.end, []).append(layer)
            for number in (layer.node, *layer.chain):
                for node in (self.nodes[number], *self.nodes[number].all_input_nodes):
                    held[numbers[node]] = max(held.get(numbers[node], 0), layer.end)
        for layer, segment in self.segments.items():
            for number in segment.inputs:
                held[number] = max(held.get(number, 0), layer.end)
        leaving: dict[int, list[int]] = {}
        for when, which in last_uses(self.nodes, held):
            leaving.setdefault(when, []).append(which)
        found: list[Refit] = []
        for number in range(len(self.nodes)):
            self.original.step(number)
            self.small.step(number)
            if number in starting:
                self.versions[number] = self._versions(starting[number])
            found += [self._together(layer, self._fit(layer)) for layer in ending.get(number, ())]
            if number in self.others:
                name, note = self.others[number]
                found.append(Refit(name, note=note))
            for which in leaving.get(number, ()):
                self.original.free(which)
                self.small.free(which)
            tick()
        return found

    def _versions(self, layer: Layer) -> list[int]:
        """How often the inputs of a layer were written to."""
        return [self.small.value(b, layer.source)._version for b in range(len(self.small.values))]

    def _fit(self, layer: Layer) -> Refit:
        keep = self._kept(layer)
        if keep is None:
            return Refit(layer.name, note="its outputs cannot be told from those of the original")
        if self._versions(layer) != self.versions[layer.node]:
            note = "its input is written to before its output is complete"
            return Refit(layer.name, note=note)
        values = self.small.values[0]
        reads = {n for number in layer.chain for n in self.nodes[number].all_input_nodes}
        constant = {n: values[n] for n in reads if n.op == "get_attr"}
        slope = slope_of(layer, self.nodes, constant)
        norm = self._norm(layer)
        centred = layer.bias is not None or norm is not None
        if not (centred or self.weights):
            return Refit(layer.name, note="no bias")
        before = after = 0.0
        for start in range(0, layer.columns if self.weights else 1, WIDEST):
            block = slice(start, start + WIDEST)
            sums = self._sums(layer, keep, slope, block)
            before = before or sums.relative
            if not math.isfinite(sums.error + sums.energy):
                return Refit(layer.name, note="NaN or infinite values behind it")
            if sums.error <= _EXACT * sums.energy:
                return Refit(layer.name, note="equal already")
            free = self._free(layer, block)
            change, shift = sums.solve(self.ridge, centred, self.weights, free)
            after = (sums.error - self._gain(sums, change, shift, centred, slope)) / sums.energy
            self._move(layer, change, block)
            self._shift(layer, shift.reshape(-1) if centred else None, norm)
        return Refit(layer.name, before, max(after, 0.0))

    def _together(self, layer: Layer, refit: Refit) -> Refit:
        """Refit the layers before this one once more, together with it."""
        segment = self.segments.get(layer)
        if refit.note or segment is None:
            return refit
        keep = self._kept(layer)
        assert keep is not None  # it was refitted
        joint = Joint(self.original, self.small, segment, keep)
        after = joint.refit(self.sweeps, self.orders)
        return refit if after is None else replace(refit, after=after)

    def _kept(self, layer: Layer) -> Tensor | None:
        """Which outputs of the original's layer stay."""
        plain = layer.weight.removesuffix("_orig")  # it may be masked in one of the models alone
        dims = self.kept.get(plain) or self.kept.get(f"{plain}_orig") or {}
        dim = 1 if layer.flipped or layer.window.kind == "transposed" else 0
        original = self.original.value(0, layer.end)
        small = self.small.value(0, layer.end)
        size = original.shape[layer.channel_dim]
        keep = dims[dim] if dim in dims else torch.arange(size)
        if layer.window.kind == "transposed" and layer.window.groups > 1 and dims:
            before: Any = self.original.nodes[0][layer.node].args[8]
            if before != layer.window.groups:  # whole groups left
                return None
            starts = torch.arange(0, size, size // before)[:, None]
            keep = (starts + dims.get(dim, torch.arange(size // before))).flatten()
        if len(keep) != small.shape[layer.channel_dim] or int(keep.max()) >= size:
            return None
        shape = list(original.shape)
        shape[layer.channel_dim] = len(keep)
        return keep.to(small.device) if shape == list(small.shape) else None

    def _sums(self, layer: Layer, keep: Tensor, slope: Tensor, block: slice) -> Sums:
        """Sums over sampled places of all batches."""
        sums = Sums()
        scale = torch.where(slope.abs() > _FLAT * slope.abs().max(), 1 / slope, 0.0)
        window = layer.window
        per_group = (window.groups, -1)
        for which in range(len(self.small.values)):
            x = self.small.value(which, layer.source)
            small = self.small.value(which, layer.end)
            wanted = self.original.value(which, layer.end).index_select(layer.channel_dim, keep)
            pick = self._pick(window.places(small)).to(x.device)
            goal = _real(window.outputs(wanted, pick))
            gap = goal - _real(window.outputs(small, pick))
            sums.add(gap, goal)
            e = (gap * scale.reshape(per_group).to(gap)).transpose(0, 1)
            rows = _real(window.rows(x, pick)[..., block]).transpose(0, 1)
            sums.xx = sums.xx + (rows.mT @ rows).double() if self.weights else rows.new_zeros(1)
            sums.xe = sums.xe + (rows.mT @ e).double()
            sums.x = sums.x + rows.sum(1).double()
            sums.e = sums.e + e.sum(1).double()
        return sums

    def _pick(self, places: int) -> Tensor:
        """Numbers of the places of one batch that are looked at."""
        if places <= self.quota:
            return torch.arange(places)
        return torch.randint(places, (self.quota,), generator=self.generator)

    def _gain(
        self, sums: Sums, change: Tensor, shift: Tensor, centred: bool, slope: Tensor
    ) -> float:
        """By how much the squared error falls, in units of the values at the end."""
        weight = slope.square().reshape(shift.shape)
        if not centred:
            shift = torch.zeros_like(shift)
        x, e, xe = (torch.as_tensor(t) for t in (sums.x, sums.e, sums.xe))
        fit = (change * xe.mT).sum(-1) + shift * e
        size = shift * (sums.count * shift + 2 * (change @ x[:, :, None])[:, :, 0])
        if self.weights:
            size = size + ((change @ torch.as_tensor(sums.xx)) * change).sum(-1)
        return float((weight * (2 * fit - size)).sum())

    def _free(self, layer: Layer, block: slice) -> Tensor | None:
        """Which weights may change: zeroes stay, so that a sparse layer stays sparse."""
        weight = self.small.tensors[layer.weight].detach()
        matrix = layer.window.matrix(weight.t() if layer.flipped else weight)[..., block]
        return None if bool((matrix != 0).all()) else matrix != 0

    def _move(self, layer: Layer, change: Tensor, block: slice) -> None:
        """Add to the weights."""
        if not self.weights:
            return
        weight = self.small.tensors[layer.weight]
        straight = weight.detach().t() if layer.flipped else weight.detach()
        matrix = layer.window.matrix(straight).double()
        matrix[..., block] += change
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
        for which, values in enumerate(self.small.values):
            for number in numbers:
                node = self.small.nodes[which][number]
                values[node] = self.small.run(which, node, values)

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
        outputs = [self.small.value(b, layer.node) for b in range(len(self.small.values))]
        variance, mean = _moments(outputs)
        weight, bias, old_mean, old_variance = (self.small.tensors[n].detach() for n in names)
        norm = norm_of(self.nodes[layer.chain[0]])
        assert norm is not None
        slope = weight.double() / (old_variance.double() + norm.eps).sqrt()
        bias.copy_(bias.double() + slope * (shift - old_mean.double() + mean))
        weight.copy_(slope * (variance + norm.eps).sqrt())
        old_mean.copy_(mean)
        old_variance.copy_(variance)


def _moments(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Variance and mean by channel over all batches, in float64."""
    count = sum(y.numel() // y.shape[1] for y in outputs)
    dims = [d for d in range(outputs[0].dim()) if d != 1]
    mean = torch.stack([_real(y).sum(dims).double() for y in outputs]).sum(0) / count
    shape = [-1 if d == 1 else 1 for d in range(outputs[0].dim())]
    squares = [
        (_real(y) - mean.to(_real(y)).reshape(shape)).square().sum(dims).double() for y in outputs
    ]
    return torch.stack(squares).sum(0) / max(count - 1, 1), mean


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
