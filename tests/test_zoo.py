"""Every network of the zoo: shrunk, verified, and as prunable as reasoning says."""

import pytest
import torch
from comparing import call, shapes, state, untouched
from zoo import ZOO

import graphprune

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
GRAPHS = {}


@pytest.fixture(params=ZOO.values(), ids=ZOO)
def entry(request):
    return request.param


def graph_of(entry):
    """The traced network, traced once for all tests."""
    if entry.name not in GRAPHS:
        GRAPHS[entry.name] = graphprune.trace(entry.build(), entry.inputs())
    return GRAPHS[entry.name]


def removable(graph):
    return sum(group.size for group in graph.groups)


def check(entry, ratio, scope, training):
    """Shrink, compare with the masked original, and look at everything that must not change."""
    graph = graph_of(entry)
    if not graph.groups:
        with pytest.raises(graphprune.errors.InputError, match=r"no channel .*of this model"):
            graph.plan(ratio, scope=scope)
        return
    model, inputs, free = entry.build().train(training), entry.inputs(), removable(graph)
    with untouched(model):
        plan = graph.plan(ratio, scope=scope)
        small = graphprune.rebuild(model, plan)
        report = graphprune.verify(model, small, inputs)
    assert report.difference <= 1e-10
    assert removable(graph) == free, f"planning froze more channels:\n{graph}"
    assert plan.removed > 0 or entry.removable is None
    assert shapes(call(small.eval(), inputs)) == shapes(call(model.eval(), inputs))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert list(small.state_dict()) == list(model.state_dict())
    kept = state(small)
    for name, tensor in state(model).items():
        assert kept[name].dtype == tensor.dtype, name
        assert kept[name].requires_grad == tensor.requires_grad, name
        assert kept[name].data_ptr() != tensor.data_ptr() or not tensor.numel(), f"{name} is shared"


def test_as_many_channels_as_reasoning_says(entry):
    graph = graph_of(entry)
    if entry.removable is not None:
        assert removable(graph) == entry.removable, str(graph)


def test_half_of_every_group(entry):
    check(entry, 0.5, "local", training=False)


def test_a_third_of_everything(entry):
    check(entry, 0.3, "global", training=True)


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "scope"), [(0.3, "local"), (0.5, "global"), (0.8, "local")])
def test_other_requests(entry, ratio, scope):
    check(entry, ratio, scope, training=False)


def test_modes_are_kept():
    model = ZOO["cifar_projected"].build().train()
    model.layer1.bn1.eval()
    small = graphprune.rebuild(model, 0.5, ZOO["cifar_projected"].inputs())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("name", ["half_precision", "bfloat16_parameters"])
def test_low_precision_runs(name):
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs()
    small = graphprune.rebuild(model, 0.5, inputs)
    assert call(small, inputs).dtype == inputs.dtype


def test_memory_format_is_kept():
    entry = ZOO["channels_last_memory"]
    small = graphprune.rebuild(entry.build(), 0.5, entry.inputs())
    weight = small.last.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
