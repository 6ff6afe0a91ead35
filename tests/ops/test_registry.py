"""Every op is tried with its own sample: the registry is the list of the tests."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torchvision  # noqa: F401  (registers ops of its own)

from graphprune.errors import OpError
from graphprune.ops import batch_norm, check, declare, forget, free, op_of
from graphprune.ops.registry import REGISTRY, UNKNOWN
from graphprune.ops.samples import of

aten = torch.ops.aten
ELSEWHERE = {
    "aten.cudnn_batch_norm": "its kernel runs on a GPU alone",
    "aten.miopen_batch_norm": "its kernel runs on a GPU alone",
    "transformers.grouped_mm_fallback": "an op of a library that is not imported",
}
if torch.__version__ < (2, 9):
    ELSEWHERE["aten._fused_rms_norm"] = "it is declared otherwise"
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_grouped_mm", "CPU"):
    ELSEWHERE["aten._grouped_mm"] = "its kernel runs on a GPU alone"
BY_TAG = {"pointwise", "pointwise_"}


@pytest.mark.parametrize("name", sorted(REGISTRY.keys() - BY_TAG - ELSEWHERE.keys()))
def test_what_is_declared_of_an_op_holds(name):
    check(name)


def test_every_op_brings_a_sample_and_says_what_it_multiplies():
    for name, op in REGISTRY.items():
        assert op.sample or op.refused or name in BY_TAG, name
        assert op.macs or op.factors, name


def test_spellings_of_batch_norm_differ_in_their_arguments_alone():
    spellings = {name: op for name, op in REGISTRY.items() if op.norm is not None}
    assert len(spellings) >= 7
    views = {
        (op.channels, op.factors, op.macs, op.fact is None, op.masked is None, op.given, op.linear)
        for op in spellings.values()
    }
    assert len(views) == 1
    unpacked = {op.norm for op in spellings.values()}
    assert unpacked == {batch_norm.flagged, batch_norm.in_eval, batch_norm.in_training}


def test_an_op_of_which_nothing_is_declared_lacks_every_view():
    assert op_of(aten.renorm) is UNKNOWN
    assert op_of(torch.nn.functional.relu) is UNKNOWN
    assert op_of(aten.erf.default).channels is op_of(aten.exp.default).channels  # by their tag
    assert op_of(aten.exp_.default).fact is None  # computed by the op without the underscore


@pytest.fixture
def declared():
    """Declarations of the test alone."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


WRONG = {
    "aten.cumsum": ({"channels": op_of(aten.clone).channels}, "has other values"),
    "aten.mm": ({"channels": op_of(aten.clone).channels}, "does not run"),
    "aten.split": ({"given": None}, "has the shape"),
    "aten.linear": ({"macs": free}, "torch counts 120"),
    "aten.bmm": ({"factors": op_of(aten.linear).factors}, "factors: raises"),
    "aten.relu": ({"fact": op_of(aten.ones_like).fact}, "depends on the input"),
    "aten.glu": ({"channels": lambda walk, node, x, dim: 1 / 0}, "raises ZeroDivisionError"),
    "aten.softmax": ({"masked": op_of(aten.norm).masked}, "has other values"),
    "aten.sigmoid": ({"linear": True}, "zeroes do not stay zeroes"),
    "aten.div": ({"powers": (1, 1)}, "operand 1 does not count"),
    "aten.sub": ({"signs": (1, 1)}, "their sum is not"),
    "aten.add": ({"meta": op_of(aten.mean).meta}, "meta"),
    "aten.argmax": ({"refused": of((5, 5), 1)}, "refused: channels can leave"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_view_is_found(name, declared):
    views, text = WRONG[name]
    REGISTRY[name] = replace(REGISTRY[name], **views)
    with pytest.raises(OpError, match=f"(?s)declared of {name} does not hold.*({text})"):
        check(name)


STATISTICS = {name for name, op in REGISTRY.items() if op.masked}
STATISTICS -= {*ELSEWHERE, "aten.native_group_norm"}  # of which whole groups leave without


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_statistics_that_no_rule_computes_freeze_their_channels(name, declared):
    REGISTRY[name] = replace(REGISTRY[name], masked=None)
    with contextlib.suppress(OpError):
        check(name)
        return
    with pytest.raises(OpError, match="none can leave"):
        check(name)


def test_what_cannot_be_tried_is_said(declared):
    with pytest.raises(OpError, match=r"aten\.renorm is not declared"):
        check(aten.renorm)
    declare(aten.renorm, macs=free)(lambda *_: ())
    with pytest.raises(OpError, match=r"aten\.renorm has no sample"):
        check(aten.renorm)
    REGISTRY["aten.renorm"] = replace(REGISTRY["aten.renorm"], sample=of((2, 3)))
    with pytest.raises(OpError, match=r"aten\.renorm does not run on its sample"):
        check(aten.renorm)
    declare("nowhere.op", macs=free, sample=of((2, 3)))(lambda *_: ())
    with pytest.raises(OpError, match=r"nowhere\.op does not run on its sample: not loaded"):
        check("nowhere.op")


def test_declarations_are_checked_when_they_are_made():
    with pytest.raises(TypeError, match=r"declare factors or macs, or macs=free"):
        declare(aten.renorm)
    with pytest.raises(TypeError, match=r"no view facts of an op; there are .*fact"):
        declare(aten.renorm, macs=free, facts=None)
    with pytest.raises(TypeError, match=r"is no op: pass torch\.ops"):
        declare(torch.mm, macs=free)
    with pytest.raises(KeyError, match=r"aten\.mm is declared already"):
        declare("aten.mm", macs=free)(lambda *_: ())
    with pytest.raises(KeyError, match=r"aten\.renorm is not declared"):
        forget(aten.renorm)
