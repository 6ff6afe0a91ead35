"""What holds for every network and every plan."""

import dataclasses
import itertools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from support.comparing import assert_close, assert_same_state, call, shapes, state, untouched
from support.strategies import kept_channels, specs
from torch.utils import _pytree as pytree

import graphprune
from graphprune.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


def prepared(spec):
    """The network, its inputs and its graph; networks that cannot shrink are left out."""
    model, inputs = spec.build(), spec.inputs()
    graph = graphprune.trace(model, inputs)
    assume(graph.groups)
    for name, _ in spec.steps:
        event(name)
    return model, inputs, graph


def drawn(data, graph):
    return data.draw(kept_channels(graph), label="kept")


def equals_masked(spec, data):
    model, inputs, graph = prepared(spec)
    plan = graph.plan_of(drawn(data, graph))
    with untouched(model):
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, inputs).difference <= 1e-10
    assert shapes(call(small, inputs)) == shapes(call(model, inputs))
    for slot in plan.slots:
        assert state(small)[slot.tensor].shape[slot.dim] == len(slot.kept) > 0


@given(specs(), st.data())
@settings(max_examples=40)
def test_small_equals_masked(spec, data):
    """Outputs, gradients and statistics, in eval and in train mode."""
    equals_masked(spec, data)


@pytest.mark.slow
@given(specs(), st.data())
@settings(max_examples=2000)
def test_small_equals_masked_at_length(spec, data):
    equals_masked(spec, data)


@given(specs())
@settings(max_examples=12)
def test_requests_are_met_and_verified(spec):
    """What the selector plans runs, too."""
    model, inputs, graph = prepared(spec)
    for scope in ("local", "global"):
        plan = graph.plan(0.5, scope=scope, criterion="random", seed=spec.seed)
        assert graphprune.verify(model, plan, inputs).difference <= 1e-10


@given(specs())
@settings(max_examples=15)
def test_keeping_all_changes_nothing(spec):
    model, inputs, graph = prepared(spec)
    for plan in (graph.plan(0), graph.plan_of({})):
        assert plan.removed == 0
        assert plan.before == plan.after
        small = graphprune.rebuild(model, plan)
        assert_same_state(model, small)
        for left, right in zip(*(pytree.tree_leaves(call(m, inputs)) for m in (model, small))):
            assert torch.equal(left, right)


@given(specs(), st.data())
@settings(max_examples=10)
def test_pruning_twice_is_pruning_once(spec, data):
    """The kept indices compose, and so do the plans where the first graph can say it."""
    model, inputs, graph = prepared(spec)
    first = graphprune.rebuild(model, graph.plan_of(drawn(data, graph)))
    again = graphprune.trace(first, inputs)
    assume(again.groups)
    plans = first.graphprune_plan, again.plan_of(drawn(data, again))
    second = graphprune.rebuild(first, plans[1])
    assert graphprune.verify(first, plans[1], inputs).difference <= 1e-10
    kept = composed(*plans)
    assert {(s.tensor, s.dim): list(s.kept) for s in second.graphprune_plan.slots} == kept
    for name, tensor in state(model).items():
        for dim in range(tensor.dim()):
            index = kept.get((name, dim), range(tensor.shape[dim]))
            tensor = tensor.index_select(dim, torch.tensor(index))
        assert torch.equal(tensor, state(second)[name]), name
    choice = expressed(graph, kept)
    if choice is not None:
        event("composed plan is a plan")
        assert_same_state(second, graphprune.rebuild(model, graph.plan_of(choice)))
        assert graphprune.verify(model, second, inputs).difference <= 1e-10


def composed(first, second):
    """Kept indices of the original by (tensor, dimension)."""
    kept = {(slot.tensor, slot.dim): list(slot.kept) for slot in first.slots}
    for slot in second.slots:
        before = kept.get((slot.tensor, slot.dim), range(slot.size))
        kept[slot.tensor, slot.dim] = [before[index] for index in slot.kept]
    return kept


def expressed(graph, kept):
    """Kept channels by group, or None when a group is cut through, or one that is frozen here."""
    choice = {}
    for group in (*graph.groups, *graph.frozen):
        stays = torch.ones(group.size, dtype=torch.bool)
        for member in group.members:
            index = torch.from_numpy(member.index)
            there = torch.isin(index, torch.tensor(kept.get((member.slot.tensor, member.slot.dim),
                                                            range(member.slot.size))))  # fmt: skip
            if not (there.all(1) == there.any(1)).all():
                return None
            stays &= there.all(1)
        if not stays.any() or (group.frozen and not stays.all()):
            return None
        if group.frozen:
            continue
        choice[group.name] = stays.nonzero().flatten().tolist()
    return choice


@given(specs(), st.data())
@settings(max_examples=15)
def test_plans_survive_json(spec, data):
    model, _, graph = prepared(spec)
    plan = graph.plan_of(drawn(data, graph), {"note": "drawn"})
    text = plan.to_json()
    read = graphprune.Plan.from_json(text)
    assert read == plan
    assert read.to_json() == text
    assert_same_state(graphprune.rebuild(model, plan), graphprune.rebuild(model, read))
    where = len(text) // 2
    with pytest.raises(PlanError):
        graphprune.Plan.from_json(text[:where])


@given(specs(), st.data())
@settings(max_examples=15)
def test_small_models_survive_files(spec, data):
    model, inputs, graph = prepared(spec)
    small = graphprune.rebuild(model, graph.plan_of(drawn(data, graph)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        graphprune.save(small, path)
        loaded = graphprune.load(path, spec.build).eval()
    persistent = small.state_dict()
    assert all(torch.equal(persistent[k], v) for k, v in loaded.state_dict().items())
    wanted, found = (pytree.tree_leaves(call(m, inputs)) for m in (small, loaded))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


@given(specs())
@settings(max_examples=10)
def test_more_ratio_never_means_more_parameters(spec):
    """Where a run decides what the code follows (``int(width * ratio)``), plans are tried alone."""
    assume(not any(name == "ByRatio" for name, _ in spec.steps))
    _, _, graph = prepared(spec)
    for scope in ("local", "global"):
        plans = [graph.plan(ratio, scope=scope) for ratio in (0, 0.1, 0.35, 0.5, 0.8, 0.99)]
        for before, after in itertools.pairwise(plans):
            assert after.after.params <= before.after.params
            assert after.after.macs <= before.after.macs
            for more, fewer in zip(before.groups, after.groups, strict=True):
                assert set(fewer.kept) <= set(more.kept)


@given(specs(), st.floats(0, 0.9999))
@settings(max_examples=12)
def test_no_group_is_ever_emptied(spec, ratio):
    _, _, graph = prepared(spec)
    for scope in ("local", "global"):
        plan = graph.plan(ratio, scope=scope)
        assert all(group.kept for group in plan.groups)
        assert all(slot.kept for slot in plan.slots)


@given(specs(), st.data())
@settings(max_examples=14)
def test_the_order_of_kept_channels_does_not_matter(spec, data):
    _, _, graph = prepared(spec)
    kept = drawn(data, graph)
    shuffled = {name: data.draw(st.permutations(channels)) for name, channels in kept.items()}
    names = data.draw(st.permutations(list(kept)))
    plan = graph.plan_of(kept)
    assert graph.plan_of({name: shuffled[name] for name in names}) == plan
    assert graph.plan_of({name: channels * 2 for name, channels in kept.items()}) == plan


@given(specs(), st.data())
@settings(max_examples=10)
def test_zeroed_parameters_agree_with_zeroed_values(spec, data):
    """The two ways to mask: zeroes in the parameters, and zeroes in the evaluated graph."""
    model, inputs, graph = prepared(spec)
    plan = graph.plan_of(drawn(data, graph))
    assume(not plan.evaluated)
    plain = graphprune.mask(model, plan)
    evaluated = graphprune.mask(model, dataclasses.replace(plan, evaluated=True))
    for wanted, found in zip(*(pytree.tree_leaves(call(m, inputs)) for m in (plain, evaluated))):
        assert_close(wanted, found)


@given(specs())
@settings(max_examples=12)
def test_analysis_is_deterministic(spec):
    """The same network gives the same groups and the same plan."""
    plans = []
    for _ in range(2):
        _, _, graph = prepared(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plans.append(graph.plan(0.5, criterion="random", seed=3))
    assert plans[0] == plans[1]
