"""Criteria of what the reading layers are given.

A channel is judged where weights sum over it: at the inputs of convolutions and linear layers. In
a grouped convolution column k of every group belongs to one position of the weight: their
statistics are joined. Behind a flattened feature map a channel takes several positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from graphprune.channels.analysis import Group, Member
from graphprune.criteria.evidence import Collector, Evidence, Key, Slots, joined, register_statistic
from graphprune.criteria.registry import Unseen, register_criterion
from graphprune.criteria.slots import by_channel, real
from graphprune.ranks import Ranks
from graphprune.record.observe import Product

T = TypeVar("T")


@dataclass
class Inputs:
    """Statistics of the inputs of one product, each of shape [input channels].

    Attributes:
        groups: parts of the input channels that share the positions of the weight's dimension.
        energy: the sum of the squared weights that read an input channel.
        count: how many values of a channel were seen: samples times places.
        mean: of the values.
        deviation: the sum of their squared deviations from the mean.
        absolute: the mean of their absolute values.
        active: the fraction that is not 0.
    """

    groups: int
    energy: Tensor
    count: int
    mean: Tensor
    deviation: Tensor
    absolute: Tensor
    active: Tensor

    @classmethod
    def of(cls, product: Product) -> Inputs:
        """Those of a product of which no value was seen yet."""
        energy = _energy(product)
        zeros = [torch.zeros_like(energy) for _ in range(4)]
        mean, deviation, absolute, active = zeros
        return cls(_parts(product), energy, 0, mean, deviation, absolute, active)

    @property
    def variance(self) -> Tensor:
        """Of the values, without Bessel's correction."""
        return self.deviation / max(self.count, 1)

    def add(self, x: Tensor) -> None:
        """Merge the statistics of more values, [values, channels] (Chan et al., 1979)."""
        new = len(x)
        total = self.count + new
        variance, mean = torch.var_mean(x, 0, correction=0)
        gap = mean.to("cpu", torch.float64) - self.mean
        self.deviation += variance.to("cpu", torch.float64) * new
        self.deviation += gap.square() * (self.count * new / total)
        self.mean += gap * (new / total)
        for known, more in ((self.absolute, x.abs()), (self.active, (x != 0).to(x.dtype))):
            known += (more.mean(0).to("cpu", torch.float64) - known) * (new / total)
        self.count = total


def reading_dim(product: Product) -> int:
    """The dimension of the parameter that meets the input channels of a product."""
    if product.kind == "linear":
        return 0 if product.flipped else 1
    return 0 if product.kind == "transposed" else 1


def channels_last(x: Tensor, kind: str) -> Tensor:
    """The input of a product, or its gradient, as real numbers [samples, places, channels]."""
    x = x.movedim(1, -1) if kind != "linear" else x
    x = x.unsqueeze(0) if x.dim() == 1 else x
    parts = real(x)
    if x.is_complex():  # real and imaginary parts as two places
        parts = parts.movedim(-1, 1)
    return parts.reshape(len(x), -1, x.shape[-1])


def _energy(product: Product) -> Tensor:
    """The sum of the squared weights that read each input channel, [input channels]."""
    squares = real(product.value).square()
    if product.value.is_complex():
        squares = squares.sum(-1)
    if product.kind == "transposed":
        found = squares.flatten(1).sum(1)
    else:  # [groups, out / groups, in / groups, kernel]
        parts = squares.reshape(product.groups, -1, squares.shape[1], *squares.shape[2:])
        found = parts.transpose(1, 2).flatten(2).sum(2).reshape(-1)
    return found.to("cpu", torch.float64)


def _parts(product: Product) -> int:
    """How many input channels share a position of the weight."""
    return product.groups if product.kind == "convolution" else 1


@register_statistic("activations")
class Activations(Collector):
    """Moments of what weights read: ``{(tensor, dim): {first row: Inputs}}``."""

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        super().__init__(model, slots)
        self.found: dict[Key, dict[int, Inputs]] = {}

    def product(self, product: Product) -> None:
        """Reduce an input to statistics by channel."""
        key = (product.weight, reading_dim(product))
        if key not in self.slots or not product.input.numel():
            return
        parts = self.found.setdefault(key, {})
        if product.start not in parts:
            parts[product.start] = Inputs.of(product)
        rows = channels_last(product.input, product.kind).flatten(0, 1)
        counted = None if product.input.is_complex() else self.counted(product)
        parts[product.start].add(rows if counted is None else rows[counted.to(rows.device)])

    def reduce(self, ranks: Ranks) -> bool:
        """The moments of the values of all ranks (Chan et al., 1979)."""
        own = _flat(self.found)
        blank = ranks.union({place: (i.groups, i.energy) for place, i in own.items()})
        means = "mean", "absolute", "active"
        sums = {(p, n): i.count * getattr(i, n) for p, i in own.items() for n in means}
        counts = {(p, "count"): torch.tensor(float(i.count)) for p, i in own.items()}
        found = ranks.sums({**sums, **counts})
        mean = {place: found[place, "mean"] / found[place, "count"] for place in blank}
        deviation = ranks.sums(
            {p: i.deviation + i.count * (i.mean - mean[p]).square() for p, i in own.items()}
        )
        self.found = {}
        for (key, start), (groups, energy) in blank.items():
            place = key, start
            count = found[place, "count"]
            absolute, active = (found[place, name] / count for name in means[1:])
            moments = mean[place], deviation[place], absolute, active
            self.found.setdefault(key, {})[start] = Inputs(groups, energy, int(count), *moments)
        return True

    def finish(self, batches: int) -> dict[Key, dict[int, Inputs]]:
        """The inputs that each slot reads."""
        return self.found


@register_statistic("activation_gradients")
class ActivationGradients(Collector):
    """Activation times gradient of what weights read: ``{(tensor, dim): {first row: effect}}``.

    An effect is the mean over batches of the sum over samples of abs(sum over places of activation
    times gradient), over all positions of a channel together, shared out among them.
    """

    backward = True

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        super().__init__(model, slots)
        self.found: dict[Key, dict[int, Tensor]] = {}

    def product(self, product: Product) -> None:
        """Have the gradient of an input reduced to sums by channel when it is there."""
        key = (product.weight, reading_dim(product))
        if key not in self.slots or not product.input.requires_grad:
            return
        # the hook must not refer to the input itself, which would then outlive its graph
        x, kind, parts = product.input.detach(), product.kind, _parts(product)
        known, start, indices = self.found.setdefault(key, {}), product.start, self.slots[key]

        def read(gradient: Tensor) -> None:
            values = (channels_last(x, kind) * channels_last(gradient, kind)).sum(1)
            values = values.reshape(len(values), parts, -1).sum(1)
            effect = joined(values, indices, lambda sums: sums.abs().sum(0))
            known[start] = known[start] + effect if start in known else effect

        product.input.register_hook(read)

    def reduce(self, ranks: Ranks) -> bool:
        """Sums over the ranks."""
        found = ranks.sums(_flat(self.found))
        self.found = {}
        for (key, start), effect in found.items():
            self.found.setdefault(key, {})[start] = effect
        return True

    def finish(self, batches: int) -> dict[Key, dict[int, Tensor]]:
        """Means over the batches."""
        return {
            key: {start: effect / batches for start, effect in known.items()}
            for key, known in self.found.items()
        }


def _flat(found: Mapping[Key, Mapping[int, T]]) -> dict[tuple[Key, int], T]:
    return {(key, start): one for key, parts in found.items() for start, one in parts.items()}


def _read(group: Group, tensors: Mapping[str, Tensor], statistic: str) -> list[tuple[Member, Any]]:
    """The readers of a group, with a statistic of what they read."""
    assert isinstance(tensors, Evidence)
    known: Mapping[Key, Mapping[int, Any]] = tensors.statistics[statistic]
    found = [
        (member, what)
        for member in group.members
        if member.reads
        for what in known.get((member.slot.tensor, member.slot.dim), {}).values()
    ]
    if not found:
        raise Unseen("no convolution or linear layer was seen to sum over its channels")
    return found


def _folded(inputs: Inputs, values: Tensor) -> Tensor:
    """The sum of the values of input channels that share a position of the weight."""
    return values.reshape(inputs.groups, -1).sum(0)


def _means(group: Group, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A statistic of the values of a channel, averaged over its positions: [readers, channels]."""
    rows = [
        by_channel(member, _folded(inputs, getattr(inputs, name)) / inputs.groups).mean(1)
        for member, inputs in _read(group, tensors, "activations")
    ]
    return torch.stack(rows)


@dataclass(frozen=True)
class MeanActivation:
    """The mean absolute value of what is read of a channel: ``mean_activation``.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR
    2017, section 2.2. Several readers are averaged.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    aggregate: ClassVar[str] = "mean"

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [readers, channels]."""
        return _means(group, tensors, "absolute")


mean_activation = register_criterion("mean_activation")(MeanActivation())


@dataclass(frozen=True)
class Apoz:
    """The fraction of what is read of a channel that is not zero: ``apoz``.

    Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
    Architectures", 2016: one minus the average percentage of zeros. A group of which no zero is
    ever read (no ReLU before its readers) cannot be seen.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    aggregate: ClassVar[str] = "mean"
    comparable: ClassVar[bool] = True

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [readers, channels]."""
        rows = _means(group, tensors, "active")
        if bool((rows == 1).all()):
            raise Unseen("none of its activations is ever zero")
        return rows


apoz = register_criterion("apoz")(Apoz())


@dataclass(frozen=True)
class Wanda:
    """How much a channel moves the outputs of its readers: ``wanda``.

    An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024
    (FLAP): the variance of a channel over samples and places times the squared norm of the weights
    that read it. What a channel contributes on average is a constant, which a bias can take over.
    After Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024
    (Wanda). FLAP ranks standard scores over all groups: ``normalise="standard"``.

    Attributes:
        fluctuation: false takes the mean square in place of the variance: for models whose biases
            are not corrected afterwards.
    """

    fluctuation: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [readers, channels]."""
        rows = [
            by_channel(member, _folded(inputs, self._square(inputs) * inputs.energy)).sum(1)
            for member, inputs in _read(group, tensors, "activations")
        ]
        return torch.stack(rows)

    def _square(self, inputs: Inputs) -> Tensor:
        return inputs.variance if self.fluctuation else inputs.variance + inputs.mean.square()


wanda = register_criterion("wanda")(Wanda())


@dataclass(frozen=True)
class TaylorActivation:
    """Activation times gradient of what is read of a channel: ``taylor_activation``.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR
    2017: the absolute value of activation times gradient, summed over the places of a sample, and
    averaged over the samples: how the loss changes, to first order, when the channel becomes zero.
    The gradient is that of the activation, whoever reads it; several readers are averaged.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activation_gradients"})
    aggregate: ClassVar[str] = "mean"
    comparable: ClassVar[bool] = True

    def __call__(
        self, group: Group, tensors: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Scores of shape [readers, channels]."""
        found = _read(group, tensors, "activation_gradients")
        return torch.stack([by_channel(member, effect).sum(1) for member, effect in found])


taylor_activation = register_criterion("taylor_activation")(TaylorActivation())
