"""A second look where two models differ: random numbers, rounding, or other channels?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from graphprune.errors import VerificationError
from graphprune.plan.leaving import left_of, names_before
from graphprune.record.copying import copy_module
from graphprune.verification.follow import Undecided
from graphprune.verification.models import (
    Check,
    DoesNotRun,
    Models,
    Pair,
    Result,
    Trial,
    difference,
)
from graphprune.verification.running import Functions
from graphprune.verification.setting import Redrawn
from graphprune.verification.sums import tied
from graphprune.verification.trials import OTHER_SIDE

ROUNDING = 64  # how many times the effect of rounding a difference may be
NOISE = 1e-3  # of the size of a tensor: from here on, it is rounding alone


def second_look(
    models: Models, trial: Trial, wanted: Result, found: Result | None, error: str
) -> list[Check]:
    """Why two models differ on a trial.

    Returns:
        Checks, where the reason is none of theirs.

    Raises:
        VerificationError: the small model is another one.
        DoesNotRun: the original does not run either.
        Undecided: it cannot be told.
    """
    if found is None and models.refusal(trial):
        raise DoesNotRun(models.refusal(trial))
    followed = follow(models, trial)
    if found is None or models.pairs(trial, wanted, found) is None:
        _no_clash(followed, trial)
        shapes = [] if found is None else [list(t.shape) for t in found.outputs]
        fail(models, trial, error or f"output shapes {shapes} instead of the original's")
    if followed.draws:
        _no_choice(models, followed)
        again = Redrawn(followed.draws, models.plan.experts)
        found, error = models.shrunk(trial, again)
        if found is None:
            fail(models, trial, error)
        if again.lost:
            text = f"random numbers of {again.lost} are drawn otherwise in the small model"
            raise Undecided(text)
    pairs = models.pairs(trial, wanted, found)
    assert pairs is not None
    if all(pair.gap <= models.tolerance for pair in pairs):
        return summed(trial, pairs, "with the random numbers of the original")
    _no_clash(followed, trial)
    if found.drawn != wanted.drawn:
        raise Undecided("the small model draws fewer random numbers of numpy, or of random")
    where = tied(models.masked)
    if where:
        raise Undecided(f"experts {where} get equal scores: which are chosen is chance")
    return _within_rounding(models, trial, wanted, pairs)


def follow(models: Models, trial: Trial) -> Functions:
    """Run the masked model once more and see what stays of every tensor."""
    forward = models.followed
    forward.forget()
    models.run_masked(forward.module, trial)
    assert forward.last is not None
    return forward.last


def _no_choice(models: Models, followed: Functions) -> None:
    """Numbers of experts that are drawn mean other ones where some have left."""
    drawn = any(func is torch.ops.aten.multinomial.default for func, *_ in followed.draws)
    if drawn and models.plan.experts:
        raise Undecided("it is drawn which experts are chosen")


def _no_clash(followed: Functions, trial: Trial) -> None:
    """At another resolution, a view may put other channels together than the plan was made for."""
    followed.follower.fates.update()
    clash = followed.follower.fates.clash
    if clash and OTHER_SIDE in trial.name:
        raise Undecided(f"the plan means other channels at this resolution: {clash}")


def _within_rounding(
    models: Models, trial: Trial, wanted: Result, pairs: list[Pair]
) -> list[Check]:
    """Whether the differences are no larger than what rounding does to the masked model itself."""
    effect: dict[tuple[str, str], float] = {}
    for seed in (1, 2):
        nearby = models.run(_nearby(models.masked, seed), trial)
        for pair in models.pairs(trial, wanted, nearby, small=False) or ():
            key = pair.kind, pair.where
            effect[key] = max(effect.get(key, 0.0), pair.gap)
    counted: list[Pair] = []
    noise: list[Pair] = []
    wrong: list[Pair] = []
    for pair in pairs:
        moved = ROUNDING * effect.get((pair.kind, pair.where), 0.0)
        if pair.gap <= models.tolerance:
            counted.append(pair)
        elif pair.gap > moved:
            wrong.append(pair)
        elif moved < NOISE:
            counted.append(pair)
        else:
            noise.append(pair)
    if wrong:
        kind = wrong[0].kind  # of gradients the worst, of buffers the first that a step changes
        same = [pair for pair in wrong if pair.kind == kind]
        worst = max(same, key=lambda pair: pair.gap) if kind == "gradients" else wrong[0]
        fail(models, trial, _told(worst))
    note = "rounding is larger than the tolerance here"
    if not noise:
        return summed(trial, counted, note)
    if any(pair.kind == "output" for pair in noise):
        raise Undecided("the output is rounding alone")
    names = ", ".join(repr(pair.where) for pair in noise[:3])
    return summed(trial, counted, f"{note}; without {names}: rounding alone")


def _nearby(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters are rounded otherwise."""
    nearby = copy_module(model, {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in nearby.parameters():
            if parameter.is_floating_point() and parameter.numel():
                step = torch.finfo(parameter.dtype).eps
                ulps = torch.randint(-4, 5, parameter.shape, generator=generator)
                parameter.mul_(1 + step * ulps.to(parameter))
    return nearby


def _told(pair: Pair) -> str:
    if pair.kind == "output":
        return f"relative difference {pair.gap:.1e}"
    if pair.kind == "gradients":
        return f"the gradient of {pair.where!r} differs by {pair.gap:.1e}"
    return f"buffer {pair.where!r} differs by {pair.gap:.1e}"


def summed(trial: Trial, pairs: list[Pair], note: str = "") -> list[Check]:
    """The largest difference of each kind."""
    worst: dict[str, float] = {}
    for pair in pairs:
        worst[pair.kind] = max(worst.get(pair.kind, 0.0), pair.gap)
    kinds = ["output", *(["gradients"] if trial.backward else []),
             *(["buffers"] if trial.training else [])]  # fmt: skip
    return [
        Check(f"{kind}, {trial.name}", str(trial.call), worst.get(kind, 0.0), note)
        for kind in kinds
    ]


def fail(models: Models, trial: Trial, text: str) -> NoReturn:
    """Raise what differs, and where first."""
    where = first_difference(models, trial)
    raise VerificationError(
        f"{trial.name}: {text} (tolerance {models.tolerance:.0e}) on {trial.call}; "
        + (f"the first module that differs is {where}" if where else "no module output differs")
    )


def first_difference(models: Models, trial: Trial) -> str | None:
    """The first module whose output differs, in the order they run."""
    forward = models.followed
    seen: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    pair = ((True, forward.module), (False, models.small))
    handles = [
        module.register_forward_hook(_keep(name, seen[masked]))
        for masked, model in pair
        for name, module in model.named_modules()
    ]
    trial = Trial(trial.name, trial.call, trial.training)
    try:
        models.run(forward.module, trial)
        assert forward.last is not None
        modes = [Redrawn(forward.last.draws, models.plan.experts)] if forward.last.draws else []
        _, error = models.shrunk(trial, *modes)
    finally:
        for handle in handles:
            handle.remove()
    plan, before = models.plan, names_before(models.plan)
    stay = left_of(models.original, plan)[0] | {each.module for each in plan.stand_ins}
    routers = {name.rpartition(".")[0] for each in plan.experts for name in each.routers}
    wanted = [item for item in seen[True] if item[0] in stay - routers]
    found = [(name, out) for each, out in seen[False] if (name := before(each)) not in routers]
    return _first(models, forward.last, wanted, found, error)


def _keep(name: str, seen: list[tuple[str, Tensor]]) -> Callable[..., None]:
    def keep(module: nn.Module, args: object, out: object) -> None:
        if isinstance(out, Tensor):
            seen.append((name, out))

    return keep


def _first(
    models: Models,
    functions: Functions,
    wanted: list[tuple[str, Tensor]],
    found: list[tuple[str, Tensor]],
    error: str,
) -> str | None:
    for (name, whole), (other, value) in zip(wanted, found):
        if name != other:
            return f"{other!r} (runs where {name!r} was expected)"
        kept = functions.follower.kept(functions.follower.node_of(whole))
        part = whole.detach()
        for dim, stays in enumerate(kept):
            part = part.index_select(dim, stays.nonzero().flatten().to(part.device))
        if part.shape != value.shape:
            return f"{name!r} (shape {list(value.shape)}, expected {list(part.shape)})"
        gap = difference(part, value)
        if not gap <= models.tolerance:
            kind = type(models.original.get_submodule(name)).__name__
            return f"{name!r} ({kind}, relative difference {gap:.1e})"
    return f"the one after {found[-1][0] if found else 'the input'!r} ({error})" if error else None
