"""A layer loses its last channel with the part around it; what options say of such layers."""

import pytest
from support.comparing import untouched
from support.streams import images, texts

import graphprune
from graphprune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")


def equal(model, plan, inputs):
    with untouched(model):
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, inputs).verdict == "equal"


@pytest.mark.parametrize("parts", ["branches", "blocks"])
def test_the_last_channel_of_a_layer_leaves_with_the_part_around_it(parts):
    model, x = images("basic", "basic", "basic")
    graph = graphprune.trace(model, x)
    plan = graph.plan(ratios={"blocks.1.conv1": 1.0}, parts=("channels", parts))
    assert [part.name for part in plan.parts] == ["blocks.1"]
    equal(model, plan, x)
    both = graph.plan(0.4, ratios={"blocks.1.*": 1}, parts=("channels", parts))
    assert both.removed
    assert "blocks.1" in [part.name for part in both.parts]
    equal(model, both, x)
    within = graph.plan(target={"macs": 0.5}, ratios={"blocks.2.bn1": 1}, parts=("channels", parts))
    assert "blocks.2" in [part.name for part in within.parts]
    assert within.after.macs <= 0.5 * within.before.macs


def test_all_heads_of_a_layer_leave():
    model, ids = texts("before", "before")
    options = {"ratios": {"layers.1.attention.attend": 1.0}, "parts": ("channels", "branches")}
    plan = graphprune.trace(model, ids).plan(**options)
    assert [part.name for part in plan.parts] == ["layers.1.attention"]
    equal(model, plan, ids)


def test_a_layer_that_no_part_lies_around_keeps_a_channel():
    model, x = images("basic", "basic")
    graph = graphprune.trace(model, x)
    with pytest.raises(InputError, match="'stem' can leave only with a part around them"):
        graph.plan(ratios={"stem": 1.0}, parts=("channels", "blocks"))
    with pytest.raises(InputError, match="leave with the branch around it"):
        graph.plan(ratios={"blocks.0.conv1": 1.0})


@pytest.mark.parametrize("min_kept", [0.2, {"blocks.0.*": 0.2, "blocks.1.conv1": 0.2}])
def test_min_kept_holds_the_parts_around(min_kept):
    model, x = images("basic", "basic", "basic")
    options = {"parts": ("channels", "blocks"), "min_kept": min_kept}
    plan = graphprune.trace(model, x).plan(0.7, **options)
    assert [part.name for part in plan.parts] == ([] if min_kept == 0.2 else ["blocks.2"])
    assert plan.removed
    equal(model, plan, x)


def test_options_for_layers_that_left_say_nothing():
    model, x = images("basic", "basic", "basic")
    graph = graphprune.trace(model, x)
    options = {"ratios": {f"blocks.{n}.conv1": 0.75 for n in range(3)}, "max_kept": {"stem": 0.9}}
    plan = graph.plan(0.4, parts=("channels", "blocks"), **options)
    assert plan.parts
    equal(model, plan, x)
    with pytest.raises(InputError, match="matches no layer"):
        graph.plan(0.4, parts=("channels", "blocks"), ratios={"nowhere": 0.5})
