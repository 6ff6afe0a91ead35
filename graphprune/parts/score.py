"""How much parts matter: what they do to the stream, to the loss, or to the outputs."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.calibration.items import count
from graphprune.criteria import name_of
from graphprune.measurement import drawn
from graphprune.ops.calls import Args, Function, Kwargs
from graphprune.parts.find import Part
from graphprune.parts.stream import covers
from graphprune.ranks import Ranks
from graphprune.record.batches import Batch, at_rest, batches, device_of, loss_of, run
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call
from graphprune.record.joins import Place, Sums, at_zero
from graphprune.record.padding import outputs
from graphprune.record.tensors import held_tensors

_BATCHES = 8  # that parts are scored on
_ITEMS = 64  # of these, where they are scored again and again
_LEAST = 1e-12
_CPU = torch.device("cpu")
Sides = Mapping[Place, int]


@dataclass(frozen=True)
class Evidence:
    """What parts are scored by: a model, batches of inputs, and a loss for those that need one."""

    model: nn.Module
    batches: tuple[Batch, ...]
    loss: Callable[..., Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, call: Call, data: Any, loss: Any, ranks: Ranks) -> Evidence:
        """The first batches of the data of all ranks; the example inputs where there are none."""
        device = device_of(model)
        if data is None:
            args, kwargs = drawn(call, device)
            return cls(model, (Batch(args, kwargs, ()),), loss)
        own = [Batch.of(batch) for batch in itertools.islice(data, _BATCHES)]
        _, places = ranks.in_turn(range(len(own)))
        read = [batch.to(_CPU) for batch, place in zip(own, places) if place < _BATCHES]
        found, _ = ranks.in_turn(read if ranks.size > 1 else own)
        return cls(model, tuple(batch.to(device) for batch in batches(found)), loss)

    def first(self, items: int) -> Evidence:
        """The first batches, which hold so many items together."""
        totals = itertools.accumulate(count(batch) or 1 for batch in self.batches)
        enough = next((n for n, total in enumerate(totals, 1) if total >= items), _BATCHES)
        return replace(self, batches=self.batches[:enough])


def ordered(
    parts: Sequence[Part],
    evidence: Evidence,
    criterion: object,
    seed: int,
    saved: Mapping[str, float],
) -> list[Part]:
    """The parts, those first that matter least.

    Args:
        parts: what may leave.
        evidence: the model and batches.
        criterion: ``"random"``, ``"taylor"`` (the first-order change of the loss) and
            ``"reconstruction"`` (the change of the outputs, greedily) as for channels; with all
            others, parts are scored by their influence: one minus the cosine between the stream
            before and after (Men et al., "ShortGPT", 2024).
        seed: for random orders.
        saved: what scores are divided by, for every part: what it saves.
    """
    name = name_of(criterion)
    if name == "random":
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
        return [parts[place] for place in order.tolist()]
    if name == "reconstruction":
        return _greedy(parts, evidence, saved)
    scored = taylor(parts, evidence) if name.startswith("taylor") else influence(parts, evidence)
    return sorted(parts, key=lambda part: scored[part.name] / saved[part.name])


def influence(parts: Sequence[Part], evidence: Evidence) -> dict[str, float]:
    """One minus the mean cosine between the stream before and after every part."""
    sides = {cut.key: cut.side for part in parts for cut in part.cuts}
    streams: dict[Place, list[tuple[Tensor, Tensor]]] = {}

    def seen(place: Place, func: Function, args: Args, kwargs: Kwargs) -> object:
        side = sides.get(place)
        before = None if side is None else args[1 - side].detach().clone()
        out = func(*args, **kwargs)
        if before is not None:
            streams.setdefault(place, []).append((before, out.detach()))
        return out

    totals = dict.fromkeys((part.name for part in parts), 0.0)
    totals.update(_turns([part for part in parts if part.groups], evidence))
    added = [part for part in parts if part.cuts]
    for batch in evidence.batches if added else ():
        streams.clear()
        with torch.no_grad(), at_rest(evidence.model), Sums(evidence.model, seen):
            run(evidence.model, batch)
        for part in added:
            first, last = streams.get(part.cuts[0].key, ()), streams.get(part.cuts[-1].key, ())
            found = [_turn(before, after) for (before, _), (_, after) in zip(first, last)]
            totals[part.name] += sum(found) / max(len(found), 1) / len(evidence.batches)
    return totals


def _turns(parts: Sequence[Part], evidence: Evidence) -> dict[str, float]:
    """What is concatenated changes the shape of what it is a part of: the outputs turn."""
    if not parts:
        return {}
    wanted, silent = list(_outputs(evidence, {})), Silent(evidence)
    found = {}
    for part in parts:
        with silent.without([part]):
            outs = _outputs(silent.evidence, {})
            turns = [_turn(*pair) for old, new in zip(wanted, outs) for pair in zip(old, new)]
        found[part.name] = sum(turns) / max(len(turns), 1)
    return found


class Silent:
    """A copy of a model in which the channels of what is concatenated are zero for a while."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = replace(evidence, model=copy_module(evidence.model, {}))
        self.tensors = dict(held_tensors(self.evidence.model))

    @contextlib.contextmanager
    def without(self, parts: Iterable[Part]) -> Iterator[None]:
        """Zeroes what leaves with some parts, of what writes and reads their channels."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for slot in (slot for part in parts for slot in part.slots):
                    tensor = self.tensors[slot.tensor]
                    before.append((tensor, tensor.clone()))
                    tensor.masked_fill_(~slot.stays(tensor.shape).to(tensor.device), 0)
            yield
        finally:
            with torch.no_grad():
                for tensor, values in reversed(before):
                    tensor.copy_(values)


def _turn(before: Tensor, after: Tensor) -> float:
    """One minus the mean cosine of the rows of a batch."""
    if before.shape != after.shape:
        return 1.0
    rows = after.double().reshape(len(after), -1)
    return float(1 - F.cosine_similarity(before.double().reshape(rows.shape), rows).mean())


def taylor(parts: Sequence[Part], evidence: Evidence) -> dict[str, float]:
    """How much the loss would change to first order, were what a part adds zero.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    2017.
    """
    sides = {cut.key: cut.side for part in parts for cut in part.cuts}
    changes = dict.fromkeys(sides, 0.0)

    def seen(place: Place, func: Function, args: Args, kwargs: Kwargs) -> object:
        side = sides.get(place)
        if side is not None and args[side].requires_grad:
            added = args[side].detach().clone()

            def note(grad: Tensor) -> None:
                changes[place] += float((grad.double() * added.double()).sum())

            given = [*args]
            given[side] = args[side].clone()  # what is added in place has no gradient of its own
            given[side].register_hook(note)
            return func(*given, **kwargs)
        return func(*args, **kwargs)

    totals = dict.fromkeys((part.name for part in parts), 0.0)
    for batch in evidence.batches:
        changes.update(dict.fromkeys(sides, 0.0))
        with torch.enable_grad(), at_rest(evidence.model), Sums(evidence.model, seen):
            loss = (evidence.loss or loss_of)(evidence.model, batch.whole)
        parameters = [p for p in evidence.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        slopes = {id(p): grad for p, grad in zip(parameters, grads) if grad is not None}
        for part in parts:
            found = sum(changes[cut.key] for cut in part.cuts)
            totals[part.name] += abs(found + sum(_changes(part, evidence.model, slopes)))
    return totals


def _changes(part: Part, model: nn.Module, slopes: Mapping[int, Tensor]) -> Iterator[float]:
    """First-order changes without the last weights of what is concatenated."""
    tensors = dict(held_tensors(model)) if part.slots else {}
    for slot in part.slots:
        tensor = tensors[slot.tensor]
        slope = slopes.get(id(tensor))
        if slope is not None and any(covers(name, slot.tensor) for name in part.modules):
            gone = ~slot.stays(tensor.shape).to(tensor.device)
            yield -float((slope.double() * tensor.detach().double() * gone).sum())


def _greedy(parts: Sequence[Part], evidence: Evidence, saved: Mapping[str, float]) -> list[Part]:
    """Again and again the part without which, beside those before it, outputs change least.

    What a part changes is taken to grow with what has left before it: one that changed more
    than the best of those looked at, when it was looked at last, is not looked at again.
    """
    evidence = evidence.first(_ITEMS)
    wanted = list(_outputs(evidence, {}))
    order = list[Part]()
    silent = Silent(evidence) if any(part.groups for part in parts) else None

    def error(part: Part) -> float:
        sides = {cut.key: cut.side for each in (*order, part) for cut in each.cuts}
        if silent is None:
            return _error(wanted, _outputs(evidence, sides)) / saved[part.name]
        with silent.without([*order, part]):
            return _error(wanted, _outputs(silent.evidence, sides)) / saved[part.name]

    waiting = [(error(part), number, 0) for number, part in enumerate(parts)]
    heapq.heapify(waiting)
    while waiting:
        _, number, seen = heapq.heappop(waiting)
        if seen < len(order) and waiting:
            heapq.heappush(waiting, (error(parts[number]), number, len(order)))
        else:
            order.append(parts[number])
    return order


def _outputs(evidence: Evidence, sides: Sides) -> Iterator[list[Tensor]]:
    """What the model returns for every batch when operands of some sums count as zero."""

    def seen(place: Place, func: Function, args: Args, kwargs: Kwargs) -> object:
        side = sides.get(place)
        return func(*args, **kwargs) if side is None else at_zero(func, args, kwargs, side)

    for batch in evidence.batches:
        with torch.no_grad(), at_rest(evidence.model), Sums(evidence.model, seen):
            yield outputs(evidence.model, batch)


def _error(wanted: Iterable[list[Tensor]], found: Iterable[list[Tensor]]) -> float:
    """The squared error of outputs over their squares."""
    gap = total = 0.0
    for left, right in zip(wanted, found):
        for one, other in zip(left, right):
            if one.shape == other.shape:
                gap += float((one.double() - other.double()).square().sum())
                total += float(one.double().square().sum())
    return gap / max(total, _LEAST)
