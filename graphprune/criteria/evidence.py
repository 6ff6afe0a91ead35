"""What criteria are given, collected in one streaming pass over batches of data.

A *statistic* is what a criterion needs besides the weights. Its collector sees every product of an
activation with a parameter while the model runs, or every gradient as soon as it is complete, and
keeps sums by channel. A gradient is freed before the next one is complete.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from graphprune.channels.analysis import Group
from graphprune.criteria.registry import Criterion, Entry, find
from graphprune.errors import InputError
from graphprune.ranks import Ranks
from graphprune.record.batches import (
    Batch,
    Loss,
    at_rest,
    batches,
    check_data,
    check_finite,
    count_of,
    forward,
    loss_of,
    told_apart,
)
from graphprune.record.checks import is_weightless
from graphprune.record.masked_names import mask_hooks
from graphprune.record.observe import Product, observing
from graphprune.record.padding import Masks, counted
from graphprune.record.tensors import named_modules, named_tensors
from graphprune.text import tracked

Key = tuple[str, int]  # a tensor and one of its dimensions
Slots = Mapping[Key, Sequence[Tensor]]  # positions of channels, [channels, positions] by group


class Evidence(Mapping[str, Tensor]):
    """All parameters and buffers by name, and the statistics that were asked for.

    A parameter that a layer does not use as it is, but masked by ``torch.nn.utils.prune`` or
    through a parametrization, has the value that the layer uses.

    Attributes:
        statistics: results of the collectors, by the name of the statistic.
        batches: how many batches they come from.
        shapes: what tensors from elsewhere must have, by name.
        own: whether some statistics are those of this rank alone.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        statistics: Mapping[str, Any] | None = None,
        batches: int = 0,
        shapes: Mapping[str, torch.Size] | None = None,
        own: bool = False,
    ) -> None:
        self.tensors = tensors
        self.statistics = statistics or {}
        self.batches = batches
        self.shapes = shapes or {}
        self.own = own

    def __getitem__(self, name: str) -> Tensor:
        found = self.tensors[name]
        shape = self.shapes.get(name, found.shape)
        if found.shape != shape:
            raise InputError(
                f"{name!r} is {list(found.shape)} in weights, and {list(shape)} in the model: pass "
                "the weights of this model"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Collector(ABC):
    """Collects one statistic in one pass; subclasses override what they listen to."""

    backward: ClassVar[bool] = False  # whether the loss is differentiated
    loss: Loss | None = None  # in place of the default loss, when the user passes none

    def __init__(self, model: nn.Module, slots: Slots) -> None:
        self.model = model
        self.slots = slots  # of the groups that will be scored
        self.mask: Tensor | None = None  # which positions of the batch are no padding
        self.number = 0  # of the batch, among those of all ranks

    def begin(self, number: int) -> None:
        """A batch begins: random numbers drawn for it must depend on its number alone."""
        self.number = number

    def counted(self, product: Product) -> Tensor | None:
        """Numbers of the rows that count of what a product reads; ``None``: all of them."""
        shape = product.input.shape
        return counted(
            self.mask, shape[:-1] if product.kind == "linear" else (shape[0], *shape[2:])
        )

    def product(self, product: Product) -> None:
        """A product of an activation with a parameter has just run."""

    def gradient(self, name: str, parameter: Tensor) -> None:
        """``parameter.grad`` is complete; it is freed afterwards, so keep no reference to it."""

    def reduce(self, ranks: Ranks) -> bool:
        """Sum what was collected over the ranks, if that is possible.

        Returns:
            Whether it was done. Otherwise each rank goes on with its own, and scores are averaged.
        """
        return False

    @abstractmethod
    def finish(self, batches: int) -> Any:
        """What criteria find in ``evidence.statistics`` under the name of the statistic."""


_COLLECTORS: dict[str, Callable[[nn.Module, Slots], Collector]] = {}


def register_statistic(name: str) -> Callable[[type[Collector]], type[Collector]]:
    """Register the collector of a statistic under the name that criteria need it by.

    Raises:
        KeyError: the name is taken.
    """

    def decorate(collector: type[Collector]) -> type[Collector]:
        if name in _COLLECTORS or name == "weights":
            raise KeyError(f"statistic {name!r} is registered already")
        _COLLECTORS[name] = collector
        return collector

    return decorate


def statistics() -> tuple[str, ...]:
    """The names of all registered statistics."""
    return tuple(sorted(_COLLECTORS))


def joined(values: Tensor, indices: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce the sums over the positions of each channel, and share the results out again.

    Args:
        values: shape [..., positions].
        indices: positions of channels, [channels, positions per channel] by group.
        reduce: [..., channels] -> [channels], such as a square.

    Returns:
        Shape [positions]; the sum over the positions of a channel is its reduced sum.
    """
    shared = torch.zeros(values.shape[-1], dtype=torch.float64)
    for index in indices:
        found = reduce(values[..., index.to(values.device)].sum(-1)).to("cpu", torch.float64)
        shared[index] = (found / index.shape[1])[:, None].expand(index.shape)
    return shared


def gather(
    model: nn.Module,
    criterion: str | Criterion,
    groups: Sequence[Group],
    data: object = None,
    loss: Loss | None = None,
    progress: bool | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    ranks: Ranks | None = None,
) -> Evidence:
    """Collect what a criterion needs, in one pass over the data.

    The model runs in eval mode. Afterwards, also on errors, its modes, buffers, gradients and
    ``requires_grad`` flags are as before. Gradients never live all at once: each is reduced to sums
    by channel and freed when it is complete. All sums are means over the batches; with a loss that
    is a mean over its batch, batches of one size make them exact.

    Args:
        model: runs on the batches.
        criterion: a registered name or a callable.
        groups: what will be scored.
        data: an iterable of batches: tensors, tuples (input, targets...) or dicts of keyword
            arguments. Not needed by criteria of the weights alone.
        loss: a function (model, batch) -> scalar; when absent, the ``loss`` that the model
            returns, else cross entropy with the target.
        progress: show a progress bar, if the error stream is a terminal; off by default.
        tensors: what stands for the parameters and buffers of the model, by name.
        ranks: processes, each with batches of its own, whose sums are added; batch i of rank r of
            n is batch ``i * n + r`` of all. This process alone when absent.

    Raises:
        InputError: the model has no weights and the criterion reads them, data is missing or
            malformed, or the loss is not a finite scalar that depends
            on the parameters.
    """
    entry = find(criterion)
    check_needs(entry, data)
    needs = needed(entry)
    if is_weightless(model) and (needs or (tensors is None and not entry.blind)):
        what = "runs the model" if needs else "reads weights"
        raise InputError(
            f"criterion {entry.name!r} {what}, and the model is on the meta device: load it; for "
            "criteria of weights alone trace(weights=...) takes a mapping of names to tensors, and "
            "criterion='random' needs none"
        )
    if tensors is not None:
        shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        return Evidence(tensors, shapes=shapes)
    tensors = _used(model)
    if not needs:
        return Evidence(tensors)
    slots: dict[Key, list[Tensor]] = {}
    for member in (member for group in groups for member in group.members):
        index = torch.from_numpy(np.ascontiguousarray(member.index))
        slots.setdefault((member.slot.tensor, member.slot.dim), []).append(index)
    ranks = ranks or Ranks(False)
    collectors = {need: _COLLECTORS[need](model, slots) for need in needs}
    found = _Pass(model, tuple(collectors.values()), loss, ranks)
    found.run(check_data(data), bool(progress) and ranks.first)
    total = sum(ranks.share(found.batches))
    counts = {
        need: total if ranks.size == 1 or collector.reduce(ranks) else found.batches
        for need, collector in collectors.items()
    }
    reduced = {need: c.finish(counts[need]) for need, c in collectors.items()}
    return Evidence(tensors, reduced, total, own=any(n != total for n in counts.values()))


@torch.no_grad()
def _used(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, weights that are computed from them as they are used."""
    tensors = dict(named_tensors(model))
    names = {id(tensor): name for name, tensor in tensors.items()}
    for _, module in named_modules(model):
        for hook in mask_hooks(module):
            source = module._parameters[f"{hook._tensor_name}_orig"]
            tensors[names[id(source)]] = hook.apply_mask(module)
        if isinstance(module, ParametrizationList):
            with at_rest(module):
                value = module()
            sources = [source for source in module._parameters.values() if source is not None]
            main = [source for source in sources if source.shape == value.shape][-1:]
            for source in sources if main else ():  # the others are in it: not counted again
                counted = value if source is main[0] else torch.zeros_like(source)
                tensors[names[id(source)]] = counted
    return tensors


def check_needs(entry: Entry, data: object) -> None:
    """Raise if a criterion needs data and there is none.

    Raises:
        InputError: says what it needs.
    """
    needs = needed(entry)
    if needs and data is None:
        raise InputError(
            f"criterion {entry.name!r} needs {' and '.join(needs)}: pass data=, an iterable of "
            "batches such as a list or a DataLoader"
        )


def needed(entry: Entry) -> tuple[str, ...]:
    """The statistics that a criterion needs.

    Raises:
        InputError: there is no such statistic.
    """
    needs = sorted(entry.needs - {"weights"})
    unknown = [need for need in needs if need not in _COLLECTORS]
    if unknown:
        raise InputError(
            f"criterion {entry.name!r} needs {unknown[0]!r}, which nothing collects; "
            f"needs: weights, {', '.join(statistics())}"
        )
    return tuple(needs)


class _Pass:
    """One pass over the data with all collectors."""

    def __init__(
        self,
        model: nn.Module,
        collectors: tuple[Collector, ...],
        loss: Loss | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.collectors, self.ranks = model, collectors, ranks
        own = [c.loss for c in collectors if c.backward]
        self.given = loss is not None
        self.loss = loss or (own[0] if own else None) or loss_of
        self.batches = 0
        self.differentiated = any(c.backward for c in collectors)
        self.listeners = [c for c in collectors if type(c).product is not Collector.product]
        self.readers = [c for c in collectors if type(c).gradient is not Collector.gradient]

    def run(self, data: Iterable[object], progress: bool) -> None:
        """Go through the data once."""
        with torch.inference_mode(False), at_rest(self.model):
            if self.differentiated:
                with torch.enable_grad(), self._kernels(), self._gradients() as parameters:
                    self._batches(data, progress, lambda batch: self._backward(batch, parameters))
            else:
                with torch.no_grad():
                    self._batches(data, progress, lambda batch: self._observed(forward, batch))

    def _batches(
        self, data: Iterable[object], progress: bool, step: Callable[[object], object]
    ) -> None:
        found = batches(data, self.ranks)
        found = found if self.given else told_apart(self.model, found)
        masks = Masks(self.model)
        for batch in tracked(found, "calibration batches", count_of(data), progress):
            check_finite(batch, self.batches)
            told = self.listeners and not self.given
            mask = masks.of(Batch.of(batch)) if told else None
            for collector in self.collectors:
                collector.mask = mask
                collector.begin(self.batches * self.ranks.size + self.ranks.rank)
            step(batch)
            self.batches += 1

    def _observed(self, call: Callable[[nn.Module, object], object], batch: object) -> object:
        if not self.listeners:
            return call(self.model, batch)
        with observing(self.model, self._product):
            return call(self.model, batch)

    def _product(self, product: Product) -> None:
        with torch.no_grad():
            for listener in self.listeners:
                listener.product(product)

    def _backward(self, batch: object, parameters: list[Tensor]) -> None:
        value = self._observed(self.loss, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the loss must be a scalar tensor; found {found}")
        level = float(value.detach())
        if not math.isfinite(level):
            raise InputError(f"the loss of batch {self.batches} is {level}")
        if not value.requires_grad:
            raise InputError(
                "the loss does not depend on the parameters: the model or the loss detaches, or "
                "runs under torch.no_grad()"
            )
        # other leaves, such as parameters of the loss, are left alone
        torch.autograd.backward(value, inputs=parameters)

    def _kernels(self) -> contextlib.AbstractContextManager[None]:
        """Kernels that differentiate in eval mode, which those of cudnn for recurrence do not."""
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        known = torch.backends.cudnn.flags(enabled=False)
        return known if recurrent else contextlib.nullcontext()

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[list[Tensor]]:
        """All parameters require gradients, and each gradient goes to the readers, then away."""
        parameters: list[tuple[str, Any]] = [
            (name, tensor)
            for name, tensor in named_tensors(self.model)
            if isinstance(tensor, nn.Parameter)
            and (tensor.is_floating_point() or tensor.is_complex())
        ]
        known = [(p, p.requires_grad, p.grad, p._post_accumulate_grad_hooks) for _, p in parameters]
        handles = []
        try:
            for name, parameter in parameters:
                parameter.grad = None
                parameter._post_accumulate_grad_hooks = None
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(self._reader(name)))
            yield [parameter for _, parameter in parameters]
        finally:
            for handle in handles:  # setting the attribute to None would not remove them
                handle.remove()
            for parameter, required, gradient, hooks in known:
                parameter._post_accumulate_grad_hooks = hooks
                parameter.requires_grad_(required)
                parameter.grad = gradient

    def _reader(self, name: str) -> Callable[[Tensor], None]:
        def read(parameter: Tensor) -> None:
            with torch.no_grad():
                for reader in self.readers:
                    reader.gradient(name, parameter)
            parameter.grad = None

        return read
