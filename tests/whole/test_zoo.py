"""Every network of the zoo: shrunk, verified, and as prunable as reasoning says."""

import json
from pathlib import Path

import pytest
import torch
from support.comparing import call, shapes, state, untouched
from support.zoo import ZOO

import graphprune
from graphprune.errors import InputError
from graphprune.testing import check as attempts

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
GRAPHS = {}
FROZEN = Path(__file__).parents[1] / "support" / "zoo" / "frozen.json"
USUAL = ("model output", "reads a model input", "rows of an embedding table")


@pytest.fixture(params=ZOO.values(), ids=ZOO, scope="module")  # one after the other
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
    assert graphprune.Plan.from_json(plan.to_json()) == plan
    assert removable(graph) == free, f"planning froze more channels:\n{graph}"
    small_groups = all(group.size * ratio < 1 for group in graph.groups)  # none loses a channel
    assert plan.removed > 0 or entry.removable is None or small_groups
    assert shapes(call(small.eval(), inputs)) == shapes(call(model.eval(), inputs))
    for new, old in zip(small.modules(), model.modules(), strict=True):
        assert isinstance(new, type(old))
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


def reasons(graph):
    """Why channels are frozen, without places in the code and without the usual reasons."""
    return sorted({group.reason.text for group in graph.frozen} - set(USUAL))


def test_frozen_for_the_stated_reasons_only(entry):
    """Every frozen channel has a reason, and no entry has other reasons than those on file.

    After a wanted change of ``zoo/frozen.json``: ``cd tests && python test_zoo.py``, and read
    the difference. Entries that are not in the file have the usual reasons only.
    """
    graph = graph_of(entry)
    assert all(group.reason.text for group in graph.frozen), str(graph)
    stated = json.loads(FROZEN.read_text(encoding="utf-8")).get(entry.name, [])
    assert reasons(graph) == stated, str(graph)


def test_every_reason_on_file_belongs_to_an_entry():
    assert set(json.loads(FROZEN.read_text(encoding="utf-8"))) <= set(ZOO)


def test_half_of_every_group(entry):
    check(entry, 0.5, "local", training=False)


OFTEN = list(ZOO)[::10]  # `verify` compares train mode in the test above as well


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_a_third_of_everything(name):
    check(ZOO[name], 0.3, "global", training=True)


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "scope"), [(0.3, "local"), (0.5, "global"), (0.8, "local")])
def test_other_requests(entry, ratio, scope):
    check(entry, ratio, scope, training=False)


def test_modes_are_kept():
    model = ZOO["cifar_projected"].build().train()
    model.layer1.bn1.eval()
    small = graphprune.rebuild(model, 0.5, ZOO["cifar_projected"].inputs())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["heads", "queries", "head_dim"])
def test_random_plans(entry, attention):
    """What users are given for their own tests, ours too: counts, places, uneven, second rounds."""
    if graphprune.trace(entry.build(), entry.inputs(), attention=attention).groups:
        attempts(entry.build().eval(), entry.inputs(), plans=3, attention=attention)


@pytest.mark.slow
def test_exact_plans(entry, tmp_path):
    """Two rounds that count what left as zeroes, and a file between them."""
    model, inputs = entry.build().eval(), entry.inputs()
    options = {"exact_only": True, "scope": "local"}
    try:
        small = graphprune.rebuild(model, 0.5, inputs, **options)
        loaded = graphprune.load(graphprune.save(small, tmp_path / "small"), entry.build().eval())
        again = graphprune.rebuild(loaded, 0.3, inputs, **options)
    except InputError:  # nothing that leaves exactly is left
        return
    for result in (small, loaded, again):
        assert graphprune.verify(model, result, inputs).difference <= 1e-10


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


def write_reasons():
    """Write ``zoo/frozen.json`` anew, one entry a line; without entries that freeze too much."""
    found = {
        name: reasons(graph_of(entry))
        for name, entry in sorted(ZOO.items())
        if entry.removable in (None, removable(graph_of(entry)))
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(texts)}" for name, texts in found.items() if texts]
    FROZEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_reasons()
