"""What ran leaves no tensors behind that would wait for Python's collector."""

import gc

import pytest
import torch
from torch import nn

import graphprune

DATA = [torch.randn(40, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def waiting(work):
    """The tensors that only the collector frees after some work."""
    gc.collect()
    gc.disable()
    try:
        work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [each for each in gc.garbage if isinstance(each, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("what", ["trace", "plan", "rebuild", "calibrate", "verify"])
def test_no_tensors_wait(model, what):
    graph = graphprune.trace(model, DATA[0])
    plan = graph.plan(0.5, criterion="reconstruction", data=DATA)
    small = graphprune.rebuild(model, plan)
    work = {
        "trace": lambda: graphprune.trace(model, DATA[0]),
        "plan": lambda: graph.plan(0.4, criterion="reconstruction", data=DATA),
        "rebuild": lambda: graphprune.rebuild(model, plan),
        "calibrate": lambda: graphprune.calibrate(small, model, DATA),
        "verify": lambda: graphprune.verify(model, small, DATA[0]),
    }
    assert not waiting(work[what])
