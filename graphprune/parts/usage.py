"""How much experts matter: by what they add for the tokens that choose them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphprune.criteria import name_of
from graphprune.parts.fewer import given_to
from graphprune.parts.mixtures import Experts
from graphprune.parts.score import Evidence
from graphprune.plan.changes import ExpertsPlan
from graphprune.planning.options import Request
from graphprune.record.batches import at_rest, loss_of, run
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call
from graphprune.record.tensors import held_tensors
from graphprune.verification.masked import mask
from graphprune.verification.models import tensors_of

Scores = dict[str, list[float]]
_SILENT = 1e-9  # of the largest change: what a token that does not choose an expert gets from it


def scores(
    model: nn.Module, mixtures: Sequence[Experts], evidence: Evidence, request: Request
) -> Scores:
    """A score for every expert of every mixture; those with small ones leave first.

    Args:
        model: the model; it is not touched.
        mixtures: those of which experts may leave.
        evidence: the batches.
        request: with its criterion: ``"random"``; ``"taylor"``, the first-order change of the loss
            without the weights of an expert; ``"reconstruction"``, the squared change of what the
            mixture returns when an expert is never chosen; ``"geometric_median"``, the turn at
            which an expert is the one of the two most alike (in their weights) that adds less;
            with all others the mean norm of what an expert adds for the tokens that choose it,
            times its router's weight (Lasby et al., "REAP the Experts", 2025).
    """
    name = name_of(request.criterion)
    if name == "random":
        generator = torch.Generator().manual_seed(request.seed)
        return {m.name: torch.rand(m.size, generator=generator).tolist() for m in mixtures}
    if name.startswith("taylor"):
        return _taylor(model, mixtures, evidence)
    with given_to(model, [mixture.name for mixture in mixtures]) as calls:
        for batch in evidence.batches:
            with torch.no_grad(), at_rest(model):
                run(model, batch)
    found = {}
    for mixture in mixtures:
        module = copy_module(model.get_submodule(mixture.name), {}).eval()
        vars(module).pop("graphprune_plan", None)
        scored = _error if name == "reconstruction" else _added
        values = scored(module, mixture, calls[mixture.name])
        alike = name == "geometric_median"
        found[mixture.name] = _turns(module, mixture, values) if alike else values
    return found


def _result(module: nn.Module, call: Call) -> Tensor:
    """What a mixture returns, beside losses of its own: [tokens, width]."""
    with torch.no_grad(), at_rest(module):
        outs = tensors_of(module(*call.args, **call.kwargs))
    out = next((out for out in outs if out.numel() > 1), outs[0])
    return out.reshape(-1, out.shape[-1]).double()


def _slices(module: nn.Module, plan: ExpertsPlan, expert: int) -> list[Tensor]:
    """What an expert is made of, without its scores."""
    tensors = dict(held_tensors(module))
    scored = {*plan.routers, *plan.added}
    owners = {name.rpartition(".")[0] for name in plan.routers}
    found = []
    for name, dim in plan.slices:
        tensor, vector = tensors[name], tensors[name].numel() == max(tensors[name].shape)
        if name in scored or (vector and name.rpartition(".")[0] in owners):
            continue
        places = _alone(plan, expert).gone_of(tensor.shape[dim])
        found += [tensor.select(dim, place) for place in places]
    for container in plan.containers:
        for key in container.of([expert]):
            found += list(module.get_submodule(f"{container.name}.{key}").parameters())
    return found


def _alone(plan: ExpertsPlan, expert: int) -> ExpertsPlan:
    """The plan by which one expert leaves."""
    return replace(plan, kept=tuple(other for other in range(plan.size) if other != expert))


def _added(module: nn.Module, mixture: Experts, calls: Sequence[Call]) -> list[float]:
    """The mean norm of what each expert adds, over the tokens that choose it."""
    whole = [_result(module, call) for call in calls]
    found = []
    for expert in range(mixture.size):
        slices = _slices(module, mixture.plan, expert)
        before = [part.detach().clone() for part in slices]
        with torch.no_grad():
            for part in slices:
                part.zero_()
        norms = [(_result(module, call) - out).norm(dim=-1) for call, out in zip(calls, whole)]
        with torch.no_grad():
            for part, values in zip(slices, before):
                part.copy_(values)
        added = torch.cat(norms) if norms else torch.zeros(1)
        chosen = added[added > _SILENT * float(added.max())]
        found.append(float(chosen.mean()) if len(chosen) else 0.0)
    return found


def _error(module: nn.Module, mixture: Experts, calls: Sequence[Call]) -> list[float]:
    """The squared change of what a mixture returns when an expert is never chosen."""
    whole = [_result(module, call) for call in calls]
    alone = replace(mixture, name="")
    found = []
    for expert in range(mixture.size):
        if expert in mixture.fixed:
            found.append(math.inf)
            continue
        masked = mask(module, alone.keeping(_alone(alone.plan, expert).kept, module))
        pairs = ((_result(masked, call), out) for call, out in zip(calls, whole))
        found.append(sum(float((one - other).square().sum()) for one, other in pairs))
    return found


def _turns(module: nn.Module, mixture: Experts, added: Sequence[float]) -> list[float]:
    """When each expert leaves: again and again, of the two most alike the one that adds less.

    The distance of two experts is that of their weights, as a fraction of both lengths; experts
    of other groups are not compared, nor those that stay.
    """
    each = mixture.size // mixture.groups
    slices = [_slices(module, mixture.plan, expert) for expert in range(mixture.size)]
    flat = [torch.cat([part.detach().double().flatten() for part in parts]) for parts in slices]
    far: dict[tuple[int, int], float] = {}
    for one, other in itertools.combinations(range(mixture.size), 2):
        same = one // each == other // each and flat[one].shape == flat[other].shape
        if same and not {one, other} & {*mixture.fixed}:
            length = float(flat[one].norm() + flat[other].norm())
            far[one, other] = float((flat[one] - flat[other]).norm()) / max(length, _SILENT)
    turns = [math.inf] * mixture.size
    for turn in range(mixture.size):
        if not far:
            break
        nearest = min(far, key=far.__getitem__)
        gone = min(nearest, key=lambda expert: added[expert])
        turns[gone] = float(turn)
        far = {pair: value for pair, value in far.items() if gone not in pair}
    return turns


def _taylor(model: nn.Module, mixtures: Sequence[Experts], evidence: Evidence) -> Scores:
    """How much the loss would change to first order without the weights of an expert."""
    found = {mixture.name: [0.0] * mixture.size for mixture in mixtures}
    for batch in evidence.batches:
        with torch.enable_grad(), at_rest(model):
            loss = (evidence.loss or loss_of)(model, batch.whole)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        changes = {
            id(p): p.detach().double() * grad.double()
            for p, grad in zip(parameters, grads)
            if grad is not None
        }
        for mixture in mixtures:
            module = model.get_submodule(mixture.name)
            for expert, total in enumerate(_sums(module, mixture.plan, changes)):
                found[mixture.name][expert] += abs(total)
    return found


def _sums(module: nn.Module, plan: ExpertsPlan, changes: dict[int, Tensor]) -> list[float]:
    """For every expert the sum of what belongs to its weights."""
    totals = [0.0] * plan.size
    tensors = dict(held_tensors(module))
    for name, dim in plan.slices:
        change = changes.get(id(tensors[name]))
        if change is not None and name not in plan.routers:
            sums = change.transpose(0, dim).flatten(1).sum(1) if change.dim() > 1 else change
            for expert in range(plan.size):
                places = _alone(plan, expert).gone_of(len(sums))
                totals[expert] += float(sums[places].sum())
    for container in plan.containers:
        for expert, key in enumerate(container.keys):
            part = module.get_submodule(f"{container.name}.{key}")
            known = (changes[id(p)] for p in part.parameters() if id(p) in changes)
            totals[expert] += sum(float(change.sum()) for change in known)
    return totals
