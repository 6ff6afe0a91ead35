"""The call that makes a plan once more, as code to copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphprune.criteria import criteria, find
from graphprune.criteria.registry import WEIGHTS
from graphprune.plan.plan import Plan
from graphprune.planning.options import OPTIONS, Request

_DEFAULTS = Request()
PLAN_CALL = 'small = graphprune.rebuild(model, graphprune.Plan.from_json("plan.json"))'


def call_of(plan: Plan) -> str:
    """Lines of Python that ask for a plan as it was asked for; empty where the plan cannot say it.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> print(call_of(graphprune.trace(net).plan(0.5, round_to=2)))
        graph = graphprune.trace(model, example_inputs)
        plan = graph.plan(0.5, round_to=2)
        small = graphprune.rebuild(model, plan)
    """
    requests: list[Mapping[str, Any]] = []
    request: Any = plan.request
    while request:
        requests.append(request)
        request = request.get("after")
    asked: list[Mapping[str, Any]] = []
    covered = False
    for request in reversed(requests):
        if covered:  # a call for several kinds of parts makes several plans
            asked[-1] = {**request, **asked[-1]}
        else:
            asked.append(request)
        covered = _goes_on(request.get("parts", ()))
    steps = [_step(request) for request in asked]
    if plan.vocabularies or not steps or not all(steps):
        return ""
    if len(steps) == 1:
        return steps[0]
    lines = ["small = model"]
    for step in steps:
        lines += step.replace("(model", "(small").splitlines()
    return "\n".join(lines)


def _goes_on(parts: Sequence[str]) -> bool:
    """Whether the same call planned other kinds of parts behind these."""
    kinds = {*parts}
    return bool(kinds - {"experts"}) if "experts" in kinds else {"channels"} < kinds


def _step(request: Mapping[str, Any]) -> str:
    attention = request.get("attention", "heads")
    traced = "" if attention == "heads" else f", attention={attention!r}"
    if request.get("masks"):
        fold = "" if request.get("fold") == "exact" else f", fold={request.get('fold')!r}"
        return (
            f"plan = graphprune.Plan.from_masks(model, example_inputs{fold}{traced})\n"
            "small = graphprune.rebuild(model, plan)"
        )
    if not {"ratio", "target", "ratios", "max_kept"} & request.keys():
        return ""
    return (
        f"graph = graphprune.trace(model, example_inputs{traced})\n"
        f"plan = graph.plan({', '.join(_arguments(request))})\n"
        "small = graphprune.rebuild(model, plan)"
    )


def _arguments(request: Mapping[str, Any]) -> list[str]:
    """The arguments of ``graph.plan`` that differ from its defaults."""
    ratio = request.get("ratio")
    found = [] if ratio is None else [repr(ratio)]
    for name in OPTIONS:
        default = _plain(getattr(_DEFAULTS, name))
        if name == "scope" and request.get("scope") == "local":
            continue
        if name in request and _plain(request[name]) != default:
            found.append(f"{name}={_plain(request[name])!r}")
    criterion = str(request.get("criterion", ""))
    needs = find(criterion).needs - WEIGHTS if criterion in criteria() else frozenset()
    found += ["data=batches"] if needs else []
    found += ["loss=loss"] if {"gradients", "activation_gradients"} & needs else []
    return found


def _plain(value: Any) -> Any:
    """As a user would write it."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping) and list(value) == ["*"]:
        return value["*"]
    return dict(value) if isinstance(value, Mapping) else value
