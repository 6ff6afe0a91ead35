"""For tests of your own models: random plans, each of them tried from end to end.

A model and example inputs enter; a table leaves, or an error with the smallest plan that fails. The
tests of this project use it on its own networks. Needs hypothesis: ``pip install
"graphprune[testing]"``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.api import ChannelGraph, rebuild, trace
from graphprune.arguments import is_int
from graphprune.errors import CheckFailed, InputError, PruningWarning
from graphprune.execute.checkpoint import load, save
from graphprune.plan.plan import Plan
from graphprune.record.inputs import Call
from graphprune.record.outputs import fields
from graphprune.record.tensors import named_modules, named_tensors
from graphprune.text import bar, render, shorten
from graphprune.verification.report import verify

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["CheckReport", "check", "plans"]

PLACES = ("last", "first", "spread", "random")
STEPS = ("rebuild", "run", "verify", "plan as JSON", "save and load", "original untouched")
_SHRINKING = 60  # how many more plans are tried to find a smaller one that fails


def plans(graph: ChannelGraph, *, rounds: int = 2) -> SearchStrategy[Plan]:
    """A hypothesis strategy of random plans for a model.

    Plans differ in how many channels each group loses, in which ones, in whether blocks (groups
    of a convolution, heads) keep channels of their own, and in whether the small model is pruned
    once more. They shrink towards the plan that removes nothing.

    Args:
        graph: what :func:`graphprune.trace` returned.
        rounds: how often a model is pruned at most; 1 for plans of a single round.

    Raises:
        InputError: no channel of the model can be removed, or ``rounds`` is no positive int.
        ImportError: hypothesis is not installed.

    Example:
        >>> import torch, graphprune
        >>> from hypothesis import given, settings
        >>> from graphprune.testing import plans
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> @settings(max_examples=5, deadline=None, database=None)
        ... @given(plans(graphprune.trace(net)))
        ... def test_shapes(plan):
        ...     assert graphprune.rebuild(net, plan)(torch.zeros(1, 4)).shape == (1, 2)
        >>> test_shapes()
    """
    st = _hypothesis().strategies
    if not is_int(rounds, 1):
        raise InputError(f"rounds must be a positive int, not {rounds!r}")
    if not graph.groups:
        reasons = shorten(dict.fromkeys(str(group.reason) for group in graph.frozen))
        raise InputError(f"no channel of this model can be removed: {reasons}")

    def drawn(draw: DrawFn) -> Plan:
        plan = _round(draw, graph)
        for _ in range(rounds - 1):
            if not plan.removed or draw(st.integers(0, 3)) < 3:
                break
            small = rebuild(graph.model, plan)
            later = trace(small, graph.call, attention=graph.attention)
            if not later.groups:
                break
            plan = plan.then(_round(draw, later))
        return plan

    strategy: SearchStrategy[Plan] = st.composite(drawn)()
    return strategy


_plans = plans  # ``check`` has an argument of this name


def _round(draw: DrawFn, graph: ChannelGraph) -> Plan:
    """One plan: channels by group, or columns of their own for every block."""
    hypothesis = _hypothesis()
    st = hypothesis.strategies
    try:
        with _quiet():
            if draw(st.integers(0, 3)) == 3:
                ratio, seed = draw(st.integers(1, 9)) / 10, draw(st.integers(0, 999))
                return graph.plan(ratio, criterion="random", columns="free", seed=seed)
            return graph.plan_of({group.name: _kept(draw, group.size) for group in graph.groups})
    except InputError:  # the code of the model cannot follow this one, and it was told
        hypothesis.reject()
        raise


def _kept(draw: DrawFn, size: int) -> list[int]:
    """Which of some channels stay: one at least."""
    st = _hypothesis().strategies
    gone = draw(st.integers(0, size - 1))
    if not gone:
        return list(range(size))
    places = draw(st.sampled_from(PLACES))
    if places == "last":
        return list(range(size - gone))
    if places == "first":
        return list(range(gone, size))
    if places == "spread":
        return [index * size // (size - gone) for index in range(size - gone)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return sorted(torch.randperm(size, generator=generator)[gone:].tolist())


@dataclass
class CheckReport:
    """What was tried on a model; every step held for every plan.

    Attributes:
        model: the class of the model.
        seed: of the plans.
        tried: how often each step was tried.
        kinds: how many plans were of one round, of two, with columns of their own.
        refused: plans that the code of the model cannot follow; the engine said so.
        difference: the largest relative difference that ``verify`` found.
        undecided: what ``verify`` could not decide, and why.
    """

    model: str
    seed: int
    tried: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    difference: float = 0.0
    undecided: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """A table of the steps."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        title = f"{self.model}: {self.tried[STEPS[0]]} plans ({kinds}), seed {self.seed}"
        rows = [
            (step, self.tried[step], f"{self.difference:.1e}" if step == "verify" else "")
            for step in STEPS
        ]
        table = render(title, ("what held", "plans", "largest relative difference"), rows)
        notes = [f"not decided for {count} plans: {why}" for why, count in self.undecided.items()]
        if self.refused:
            notes.append(f"{self.refused} plans were refused: the code of the model cannot follow")
        return "\n".join([table, *notes])


def check(
    model: nn.Module,
    example_inputs: object = None,
    plans: int = 50,
    seed: int = 0,
    *,
    attention: str = "heads",
    dtype: torch.dtype = torch.float64,
    progress: bool = False,
) -> CheckReport:
    """Try random plans on a model: rebuild, run, verify, save and load, original untouched.

    Args:
        model: any module that runs; it is not touched.
        example_inputs: as for :func:`graphprune.trace`; inferred when absent.
        plans: how many to try.
        seed: of the plans: the same seed tries the same ones.
        attention: as for :func:`graphprune.trace`.
        dtype: the precision that ``verify`` compares in.
        progress: show a progress bar, if the error stream is a terminal.

    Returns:
        A report; ``print`` it.

    Raises:
        CheckFailed: a step does not hold; names it, with the smallest plan found that fails
            (``error.plan``, ``error.step``) and the error behind it as its cause.
        InputError: an argument is wrong, or no channel of the model can be removed.
        ImportError: hypothesis is not installed.
        ModelError, TraceError: as for :func:`graphprune.trace`.

    Example:
        >>> import torch
        >>> from graphprune.testing import check
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> check(net, torch.zeros(2, 4), plans=5).tried["verify"]
        5
    """
    hypothesis = _hypothesis()
    if not is_int(plans, 1):
        raise InputError(f"plans must be a positive int, not {plans!r}")
    graph = trace(model, example_inputs, attention=attention)
    strategy = _plans(graph)
    report = CheckReport(type(model).__name__, seed)
    attempt = _Attempts(graph, report, dtype, plans + _SHRINKING)
    settings = hypothesis.settings(
        max_examples=plans, deadline=None, database=None, print_blob=False,
        report_multiple_bugs=False, verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # fmt: skip

    state = torch.get_rng_state()
    try:
        with bar("plans", plans, progress) as tick:

            def run(plan: Plan) -> None:
                attempt(plan)
                tick()

            settings(hypothesis.seed(seed)(hypothesis.given(strategy)(run)))()
    except CheckFailed as failure:
        raise failure from failure.__cause__
    finally:
        torch.set_rng_state(state)
    return report


class _Attempts:
    """Tries one plan after the other, and remembers which of them fail."""

    def __init__(
        self, graph: ChannelGraph, report: CheckReport, dtype: torch.dtype, most: int
    ) -> None:
        self.graph, self.report, self.dtype, self.left = graph, report, dtype, most
        self.failed: dict[str, CheckFailed] = {}
        self.before = _state(graph.model)

    def __call__(self, plan: Plan) -> None:
        """Raise ``CheckFailed`` if a step does not hold."""
        key = plan.to_json()
        if key in self.failed:
            raise self.failed[key]
        self.left -= 1
        if self.left < 0:  # enough was tried to find a smaller one
            return
        if not self.failed:
            self.report.kinds[_kind(plan)] += 1
        step = STEPS[0]
        try:
            for step in self.steps(plan):
                if not self.failed:
                    self.report.tried[step] += 1
        except Exception as error:
            self.failed[key] = CheckFailed(_failure(self.report, step, plan, error), plan, step)
            raise self.failed[key] from error

    def steps(self, plan: Plan) -> Iterator[str]:
        """Each step, before it is done."""
        model, call = self.graph.model, self.graph.call
        with _quiet():
            yield "rebuild"
            small = rebuild(model, plan)
            yield "run"
            found = _shapes(small, call, plan)
            wanted = _shapes(model, call, plan)
            assert found == wanted, f"outputs are {found}, those of the original {wanted}"
            yield "verify"
            self._verify(small, call)
            yield "plan as JSON"
            assert Plan.from_json(plan.to_json()) == plan, "the plan read back is another one"
            yield "save and load"
            with tempfile.TemporaryDirectory() as folder:
                loaded = load(save(small, Path(folder) / "small.safetensors"), model)
            assert _same(_state(loaded), _state(small)), "the loaded model is another one"
            yield "original untouched"
            assert _same(_state(model), self.before), "the original was changed"

    def _verify(self, small: nn.Module, call: Call) -> None:
        report = verify(self.graph.model, small, call, dtype=self.dtype)
        self.report.difference = max(self.report.difference, report.difference)
        if report.verdict != "equal" and not self.failed:
            self.report.undecided[report.reason] += 1


def _failure(report: CheckReport, step: str, plan: Plan, error: BaseException) -> str:
    tried = report.tried[STEPS[0]]
    return (
        f"{report.model} fails at {step!r} (seed {report.seed}, {tried} plans tried): "
        f"{type(error).__name__}: {error}\nthe smallest plan found that fails:\n{plan}"
    )


def _kind(plan: Plan) -> str:
    if "after" in plan.request:
        return "of two rounds"
    return "with columns of their own" if plan.free_columns else "of one round"


def _shapes(model: nn.Module, call: Call, plan: Plan) -> list[tuple[int, ...]]:
    """The shapes of the outputs that count, in eval mode, on the device of the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = call.on(device)
    modes = [(module, module.training) for _, module in named_modules(model)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            out = model.eval()(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training
    leaves = [leaf for leaf in pytree.tree_leaves(fields(out)) if isinstance(leaf, Tensor)]
    return [tuple(leaves[place].shape) for place in plan.counted(len(leaves))]


def _state(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    """Copies of all tensors, and the modes of all modules."""
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
    return tensors, [module.training for _, module in named_modules(model)]


def _same(left: tuple[dict[str, Tensor], list[bool]], right: Any) -> bool:
    tensors, modes = right
    if left[1] != modes or left[0].keys() != tensors.keys():
        return False
    pairs = [(tensor, tensors[name]) for name, tensor in left[0].items()]
    return all(a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    """Numbers that are not numbers equal themselves."""
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that less was removed than asked for: plans are drawn at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        yield


def _hypothesis() -> Any:
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError(
            'random plans need hypothesis: pip install "graphprune[testing]"'
        ) from error
    return hypothesis
