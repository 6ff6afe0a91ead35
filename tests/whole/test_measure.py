"""Measurements against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError, ModelError, TraceError
from graphprune.measurement import Measurement, bytes_text, count_text, latency_text, measure


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def test_counts_by_hand() -> None:
    found = measure(convnet(), torch.randn(2, 3, 10, 10), latency=False)
    assert found.parameters == (8 * 27 + 8) + 16 + (4 * 8 + 4)
    assert found.macs == 2 * 100 * (8 * 27 + 4 * 8)
    assert found.bytes == 4 * found.parameters + 4 * 16 + 8
    assert found.latency is None
    assert found.inputs == "float32[2, 3, 10, 10]"


class Chain(nn.Module):
    """Inputs of 1000 floats; what runs on them is given."""

    def __init__(self, body: object) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1000))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.scale)


def keep(x: Tensor, scale: Tensor) -> Tensor:
    first = x * scale  # kept until the end
    second = first.exp()
    third = second.sin()
    return third + first


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (lambda x, scale: x * scale, 2),
        (lambda x, scale: (x * scale).exp(), 3),
        (lambda x, scale: (x * scale).exp().sin(), 3),
        (lambda x, scale: (x * scale).exp_().sin_(), 2),
        (lambda x, scale: (x * scale).view(10, 100).t()[:5].t(), 2),
        (lambda x, scale: (x * scale).split(100)[0], 2),
        (lambda x, scale: x, 1),
        (lambda x, scale: torch.sort(x * scale)[0], 5),  # with int64 indices
        (lambda x, scale: (x * scale).half(), 2.5),
        (lambda x, scale: scale.expand(7, 1000), 1),
        (keep, 4),
    ],
)
def test_peak_of_activations(body: object, values: float) -> None:
    found = measure(Chain(body), torch.randn(1000), latency=False)
    assert found.activation_bytes == 4000 * values


def test_activations_of_a_batch_norm() -> None:
    x = torch.randn(1, 8, 10, 10)
    found = measure(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), x, latency=False)
    assert found.activation_bytes == 3 * 3200


class Branches(nn.Module):
    """Takes and returns dictionaries, drops out, counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, a: Tensor, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        self.count += 1
        self.calls += 1
        y = self.norm(self.linear(a)) + pair[0]
        return {"y": F.dropout(y, training=self.training), "z": pair[1]}


def test_any_inputs_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Branches().train()
    model.norm.eval()
    inputs = {"a": torch.randn(3, 4), "pair": (torch.randn(8), torch.arange(5))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure(model, inputs, repeats=3, threads=1)
    assert found.latency is not None
    assert found.macs == 3 * 4 * 8
    assert model.training
    assert not model.norm.training
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_shrinking_costs_less() -> None:
    model = convnet()
    x = torch.randn(1, 3, 32, 32)
    before, after = measure(model, x), measure(graphprune.rebuild(model, 0.5, x), x)
    both = before.compare(after)
    assert set(both.ratios) == {
        "parameters", "MACs", "memory of weights", "peak of activations", "latency"
    }  # fmt: skip
    assert both.ratios["parameters"] == after.parameters / before.parameters < 0.6
    assert both.ratios["peak of activations"] < 0.6


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    found = measure(model, torch.randn(1, 4), latency=False)
    assert (found.parameters, found.bytes, found.macs) == (24, 96, 32)


def test_inputs_are_inferred_and_meta_is_enough_for_counts() -> None:
    with torch.device("meta"):
        model = convnet()
    assert measure(model, latency=False).inputs == "float32[1, 3, 224, 224]"
    with pytest.raises(ModelError, match="pass latency=False"):
        measure(model)


def test_printing() -> None:
    before = Measurement("Net", "float32[1, 4]", "cpu", 11_690_000, 2_000, 999, 0, 12.34, 0.5)
    after = Measurement("Net", "float32[1, 4]", "cpu", 3_060_000, 1_000, 999, 0)
    assert str(before).splitlines()[0] == "Net on float32[1, 4], cpu"
    assert "12.3 ms (IQR 0.5)" in str(before)
    lines = [line.split() for line in str(before.compare(after)).splitlines()]
    assert ["parameters", "11.69", "M", "3.06", "M", "26.2", "%"] in lines
    assert not any(line[0] == "latency" for line in lines)
    assert math.isnan(before.compare(after).ratios["peak of activations"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(999), "999"),
        (count_text(1000), "1.00 k"),
        (count_text(999_999), "1.00 M"),
        (count_text(11_689_512), "11.69 M"),
        (bytes_text(12), "12 B"),
        (bytes_text(46_800_000), "46.80 MB"),
        (latency_text(0.1234, 0.01), "0.123 ms (IQR 0.010)"),
        (latency_text(123.4, None), "123.4 ms"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ({"repeats": 0}, InputError, "repeats must be a positive int, got 0"),
        ({"threads": 1.5}, InputError, "threads must be a positive int, got 1.5"),
        ({"example_inputs": torch.randn(1, 5)}, TraceError, "does not run on the example inputs"),
    ],
)
def test_mistakes(arguments: dict[str, object], kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern):
        measure(nn.Linear(4, 2), **arguments)


def test_only_modules() -> None:
    with pytest.raises(ModelError, match=r"must be a torch.nn.Module, not int"):
        measure(3)
