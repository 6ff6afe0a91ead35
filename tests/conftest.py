"""Settings of the whole test suite: one thread, fixed seeds, deterministic hypothesis."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

gc.disable()  # until all is imported: that is kept, and a lot to look through for garbage
gc.set_threshold(10_000)  # tests make many objects that live for a moment
settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deterministic")

with torch.device("meta"):  # torch lists its constructors at the first such call, for good:
    torch.empty(0)  # not while a library has replaced some


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _kept():
    """What is left of a file of tests (imports, caches) is not looked through again and again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # torch.manual_seed tells all devices, which is slow
