"""Which parts leave for a budget: by what they save of it, and by the error after a repair."""

import itertools

import numpy as np
import pytest
import torch
from support.streams import images, texts
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.parts import choose, depth, score
from graphprune.parts.saving import savings
from graphprune.planning.latency import Sample
from graphprune.planning.options import Request
from graphprune.planning.targets import targets_of
from graphprune.ranks import Ranks
from graphprune.record.inputs import Call

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


class Equal:
    """A bench on which every op takes a millisecond, but one kind, which takes a hundred."""

    def __init__(self, finder, slow=""):
        self.names = tuple(str(node.target.overloadpacket) for node in finder.record.ops)
        self.ops = tuple(100.0 if slow and slow in name else 1.0 for name in self.names)

    def samples(self, models, counts):
        return [Sample((), self.names, self.ops, float(np.sum(self.ops)))]


def of(graph, target, slow=""):
    finder = graph.finder
    targets = targets_of(target) if target else {}
    bench = Equal(finder, slow)
    found = savings(finder.single_blocks, targets, finder, graph.model, bench)
    return [found[part.name] for part in finder.single_blocks]


def test_savings_are_of_what_a_target_limits():
    model, x = images("inverted", "inverted", "inverted")
    graph = graphprune.trace(model, x)
    blocks = graph.finder.single_blocks
    macs = [part.macs / graph.cost.macs for part in blocks]
    params = [part.params / graph.cost.params for part in blocks]
    assert of(graph, {}) == [1.0] * len(blocks)
    assert of(graph, {"macs": 0.5}) == pytest.approx(macs)
    assert of(graph, {"memory": 0.5}) == pytest.approx(macs)
    assert of(graph, {"params": 0.5}) == of(graph, {"bytes": 0.5}) == pytest.approx(params)
    both = of(graph, {"macs": 0.5, "params": 0.5})
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(macs, params)])


def test_of_time_ops_that_leave_save_their_own():
    model, x = texts("before", "parallel", "before")
    graph = graphprune.trace(model, x)
    ops = graph.finder.record.ops
    gone = [len(ops) - len(graph.finder.needed({c.key: c.side for c in part.cuts}) & {*ops})
            for part in graph.finder.single_blocks]  # fmt: skip
    assert of(graph, {"latency": 0.5}) == pytest.approx([n / len(ops) for n in gone])
    assert all(0 < n < len(ops) for n in gone)


@pytest.mark.parametrize("slow", ["scaled_dot_product", "gelu"])
def test_the_part_leaves_first_that_saves_most_time(monkeypatch, slow):
    model, x = texts("before", "before")
    finder = graphprune.trace(model, x).finder
    monkeypatch.setattr(depth, "Bench", lambda *args: Equal(finder, slow))
    monkeypatch.setattr(score, "influence", lambda parts, evidence: {p.name: 1.0 for p in parts})
    request = Request.of(None, {"target": {"latency": 0.5}, "parts": "branches"})
    evidence = score.Evidence.of(model, Call.of(x), None, None, Ranks(False))
    first, *_ = depth.Depth(model, Call.of(x), request, finder, evidence).order
    needed = finder.needed({cut.key: cut.side for cut in first.cuts})
    gone = [str(node.target) for node in finder.record.ops if node not in needed]
    assert any(slow in name for name in gone)


def test_greedy_takes_the_part_that_changes_least_beside_those_before():
    model, x = images(*["inverted"] * 5)
    graph = graphprune.trace(model, x)
    parts = graph.finder.single_blocks
    evidence = score.Evidence.of(model, Call.of(x), [x], None, Ranks(False))
    saved = dict.fromkeys((part.name for part in parts), 1.0)
    order = score.ordered(parts, evidence, "reconstruction", 0, saved)
    wanted = list(score._outputs(evidence, {}))

    def error(chosen):
        sides = {cut.key: cut.side for part in chosen for cut in part.cuts}
        return score._error(wanted, score._outputs(evidence, sides))

    left, chosen = [*parts], []
    while left:
        best = min(left, key=lambda part: error([*chosen, part]))
        chosen.append(best)
        left.remove(best)
    assert [part.name for part in order] == [part.name for part in chosen]


def test_greedy_looks_at_few_items_and_few_parts_again(monkeypatch):
    model, x = images(*["inverted"] * 6)
    data = [torch.randn(40, 3, 8, 8) for _ in range(8)]
    evidence = score.Evidence.of(model, Call.of(x), data, None, Ranks(False))
    runs = itertools.count()
    outputs = score.outputs
    monkeypatch.setattr(score, "outputs", lambda *args: (next(runs), outputs(*args))[1])
    parts = graphprune.trace(model, x).finder.single_blocks
    saved = dict.fromkeys((part.name for part in parts), 1.0)
    assert len(score.ordered(parts, evidence, "reconstruction", 0, saved)) == len(parts)
    every = sum(range(1, len(parts) + 1))  # each part that is left, each time
    assert next(runs) <= 2 * (1 + every)  # batches of 40: two are 64 items
    assert len(evidence.first(64).batches) == 2
    assert len(evidence.first(10**9).batches) == 8


def test_auto_takes_the_number_of_parts_that_is_best_after_a_repair(monkeypatch):
    model, x = images(*["inverted"] * 5)
    data = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    options = {"parts": ("channels", "blocks"), "target": {"macs": 0.5}, "data": data}
    graph = graphprune.trace(model, x)
    plan = graph.plan(criterion="auto", **options)
    assert any(note.startswith("error of the outputs") for note in plan.notes)
    assert graphprune.verify(model, graphprune.rebuild(model, plan), x).verdict == "equal"
    seen = {}

    def repaired(self, plan):
        seen[len(plan.parts)] = abs(len(plan.parts) - 1) / 100
        return seen[len(plan.parts)]

    monkeypatch.setattr(choose.Chooser, "_repaired", repaired)
    assert len(graph.plan(criterion="auto", **options).parts) == 1
    assert {0, 1} <= seen.keys()
    seen.clear()
    graph.plan(criterion="l2", **options)  # which is chosen for training, or for nothing
    assert not seen


def test_numbers_of_parts_are_tried_on_few_batches(monkeypatch):
    model, x = images(*["inverted"] * 4)
    data = [torch.randn(50, 3, 8, 8) for _ in range(5)]
    lengths = []
    widths = type(graphprune.trace(model, x)).widths

    def noted(self, request):
        lengths.append(len(list(request.data)))
        return widths(self, request)

    monkeypatch.setattr(type(graphprune.trace(model, x)), "widths", noted)
    options = {"parts": ("channels", "blocks"), "target": {"macs": 0.5}, "data": data}
    plan = graphprune.trace(model, x).plan(criterion="wanda", **options)
    assert plan.groups  # widths were chosen as well
    assert lengths[0] == 5  # for all of it
    assert set(lengths[1:-1]) == {2}  # of 50 images each
    assert lengths[-1] == 5


class Inverted(nn.Module):
    """Adds its input where it keeps the resolution."""

    def __init__(self, stride):
        super().__init__()
        self.adds = stride == 1
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride, 1), nn.BatchNorm2d(4)
        )

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


@pytest.mark.parametrize("parts", ["blocks", "branches"])
@pytest.mark.parametrize(("strides", "gone"), [((1, 1, 1), 2), ((2, 1, 1), 2), ((2, 1), 1)])
def test_all_leave_where_a_module_of_their_class_stays(parts, strides, gone):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), *map(Inverted, strides)).eval()
    graph = graphprune.trace(layers, torch.randn(2, 3, 8, 8))
    plan = graph.plan(0.9, parts=parts)
    assert len(plan.parts) == gone
    small = graphprune.rebuild(layers, plan)
    assert graphprune.verify(layers, small, torch.randn(2, 3, 8, 8)).verdict == "equal"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 0.5}, "criterion 'l2' runs the model"),
        ({"ratio": 0.5, "criterion": "taylor"}, "criterion 'taylor' runs the model"),
        ({"target": {"latency": 0.5}}, "a latency is measured"),
        ({"target": {"macs": 0.5}, "parts": ("blocks", "channels")}, "numbers of parts are"),
    ],
)
def test_without_weights_what_would_run_is_told(options, told):
    model, x = images(*["inverted"] * 3)
    graph = graphprune.trace(model.to("meta"), x)
    asked = {"parts": "blocks", "ratio": None, **options}
    with pytest.raises(InputError, match=f"{told}.*meta device: load it"):
        graph.plan(**asked)
    plan = graph.plan(0.5, parts="blocks", criterion="random")
    assert plan.parts
