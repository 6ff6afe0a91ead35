"""From a criterion to one score per channel: aggregation over slots, and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graphprune.channels.analysis import Group
from graphprune.criteria.evidence import Evidence, needed
from graphprune.criteria.registry import Criterion, Entry, Unseen, find
from graphprune.errors import InputError, warn
from graphprune.ranks import Ranks

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {  # [slots, channels] -> [channels]
    "sum": lambda slots: slots.sum(0),
    "mean": lambda slots: slots.mean(0),
    "max": lambda slots: slots.amax(0),
    "product": lambda slots: slots.prod(0),
    "norm": lambda slots: slots.square().sum(0).sqrt(),
    "root": lambda slots: slots[0],  # the slot that comes first in the model
}
NORMALISATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda score, macs: score,
    "mean": lambda score, macs: score / (score.abs().mean() or 1.0),
    "max": lambda score, macs: score / (score.abs().amax() or 1.0),
    "standard": lambda score, macs: (score - score.mean()) / (score.std(correction=0) or 1.0),
    "macs": lambda score, macs: score / macs,
}


def comparable(criterion: str | Criterion) -> bool:
    """Whether the scores of different groups are on one scale, without normalisation."""
    return find(criterion).comparable


def scores(
    criterion: str | Criterion,
    groups: Sequence[Group],
    evidence: Mapping[str, Tensor],
    seed: int,
    aggregate: str | None = None,
    normalise: str = "none",
    costs: Mapping[str, float] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """The score of every channel, by group name, in float64 on the CPU.

    Args:
        criterion: a registered name or a callable.
        groups: what is scored.
        evidence: from ``gather``; all parameters and buffers by name are enough for criteria of
            the weights alone.
        seed: for criteria that draw random numbers.
        aggregate: how scores of several slots become one: ``"sum"``, ``"mean"``, ``"max"``,
            ``"product"``, ``"norm"`` (root of the sum of squares) or ``"root"`` (the slot that
            comes first in the model); when absent, what the criterion says.
        normalise: scores of a group divided by the ``"mean"`` or ``"max"`` of their absolute
            values, made ``"standard"`` scores (mean 0, deviation 1), divided by the MACs that a
            channel costs (``"macs"``), or left as they are (``"none"``).
        costs: MACs saved per channel by group name, for ``normalise="macs"``.
        ranks: which share the groups among them, where a criterion says that it can (``apart``).

    Returns:
        Scores of shape [channels] by group name. A group that the criterion cannot see is not
        among them: it must stay whole.

    Raises:
        InputError: an unknown name, statistics that were not gathered, a criterion of the wrong
            shape, a score that is not finite, or no group that the criterion can see.

    Warns:
        PruningWarning: names the groups that the criterion cannot see.
    """
    entry = find(criterion)
    _check(entry, evidence, aggregate, normalise, costs)
    generator = torch.Generator().manual_seed(seed)
    known: dict[str, Tensor | str] = {}  # or why it cannot be seen
    turns = ranks if ranks is not None and entry.apart else Ranks(False)
    for group in groups[turns.rank :: turns.size]:
        try:
            known[group.name] = _score(entry, group, evidence, generator, aggregate)
        except Unseen as reason:
            known[group.name] = str(reason)
    for others in turns.share(known):
        known |= others
    found, unseen = {}, []
    for group in groups:
        score = known[group.name]
        if isinstance(score, str):
            unseen.append((group, score))
            continue
        cost = float(costs[group.name]) if normalise == "macs" and costs else 1.0
        found[group.name] = NORMALISATIONS[normalise](score, max(cost, 1.0))
    if unseen:
        _report(entry, unseen, bool(found))
    return found


def _check(
    entry: Entry,
    evidence: Mapping[str, Tensor],
    aggregate: str | None,
    normalise: str,
    costs: Mapping[str, float] | None,
) -> None:
    for name, value, known in (
        ("aggregate", aggregate or entry.aggregate, AGGREGATES),
        ("normalise", normalise, NORMALISATIONS),
    ):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if normalise == "macs" and costs is None:
        raise InputError('normalise="macs" needs the MACs of a channel of every group: pass costs=')
    given = evidence.statistics if isinstance(evidence, Evidence) else {}
    missing = [need for need in needed(entry) if need not in given]
    if missing:
        raise InputError(
            f"criterion {entry.name!r} needs {' and '.join(missing)}: pass data=, an iterable of "
            "batches such as a list or a DataLoader"
        )


def _score(
    entry: Entry,
    group: Group,
    evidence: Mapping[str, Tensor],
    generator: torch.Generator,
    aggregate: str | None,
) -> Tensor:
    result = torch.as_tensor(entry.function(group, evidence, generator))
    shape = tuple(result.shape)
    if result.dim() not in (1, 2) or shape[-1] != group.size or not shape[0]:
        raise InputError(
            f"criterion {entry.name!r} returned shape {shape} for group {group.name} of "
            f"{group.size} channels; return one score per channel, [channels] or [slots, channels]"
        )
    score = result.detach().to("cpu", torch.float64)
    if score.dim() == 2:
        score = AGGREGATES[aggregate or entry.aggregate](score)
    if not bool(score.isfinite().all()):
        raise InputError(
            f"criterion {entry.name!r} is not finite for group {group.name} ({group.layers[0]}): "
            "look for NaN or infinite weights, gradients or activations"
        )
    return score


def _report(entry: Entry, unseen: Sequence[tuple[Group, str]], some: bool, most: int = 6) -> None:
    """Say which groups a criterion cannot see."""
    reasons: dict[str, list[str]] = {}
    for group, reason in unseen:
        reasons.setdefault(reason, []).append(f"{group.name} ({', '.join(group.layers[:2])})")
    lines = [
        f"  {reason}: {', '.join(names[:most])}" + (", ..." if len(names) > most else "")
        for reason, names in reasons.items()
    ]
    if not some:
        raise InputError(
            f"criterion {entry.name!r} cannot see any group; choose another one:\n"
            + "\n".join(lines)
        )
    count = "1 group" if len(unseen) == 1 else f"{len(unseen)} groups"
    warn(f"criterion {entry.name!r} cannot see {count} (left whole):\n" + "\n".join(lines))
