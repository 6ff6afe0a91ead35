"""Files of ONNX read as modules: equal to the file, made smaller, written back, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.exported import EXPORTERS, Residual, write
from support.onnx_samples import SAMPLES, Sample
from torch import nn

import graphprune
from graphprune.deploy import export, from_onnx
from graphprune.deploy.reading.door import TABLE
from graphprune.deploy.reading.source import source_of

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's exporters
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def file_of(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path, exporter: str, **more: object
) -> Path:
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    return write(model, inputs, folder / "net.onnx", exporter, **more)  # type: ignore[arg-type]


def randomized(model: nn.Module) -> nn.Module:
    """The same with statistics and biases that are no two alike."""
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 0.9) if tensor.dim() == 1 else nn.init.normal_(tensor)
    return model.eval()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_residual_network_from_file_to_file(tmp_path: Path, exporter: str) -> None:
    net, x = randomized(Residual()), torch.randn(2, 3, 8, 8)
    path = file_of(net, (x,), tmp_path, exporter)
    model = from_onnx(path)
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-4)
    assert type(model.get_submodule("first.0")) is nn.Conv2d
    assert type(model.fc) is nn.Linear
    small = graphprune.rebuild(model, 0.5, x)
    assert small.fc.in_features == 16
    assert graphprune.verify(model, small, x).verdict == "equal"
    made = export(small, tmp_path / "small.onnx", x)
    assert made.verdict == "equal"
    assert made.inputs[0].name == "x"
    assert made.inputs[0].shape[1:] == (3, 8, 8)
    assert isinstance(made.inputs[0].shape[0], str)
    assert made.outputs[0].name == "y"
    assert made.outputs[0].shape[1:] == (5,)
    again = from_onnx(tmp_path / "small.onnx")
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-4)
    assert source_of(small) == source_of(model)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_operator_computes_what_the_engine_does(tmp_path: Path, sample: Sample) -> None:
    path = sample.write(tmp_path / "sample.onnx")
    within = tuple(  # of the domain of logarithms, roots and arcs
        (x.abs() % 0.8 + 0.1 if x.is_floating_point() else x)
        for x in source_of(from_onnx(path, check=False)).example()
    )
    agreement = source_of(from_onnx(path, within)).agreement
    assert agreement is not None
    assert agreement.verdict == "equal"


def test_every_operator_has_a_sample() -> None:
    assert set(TABLE) - {sample.op for sample in SAMPLES} == {"ConstantOfShape", "Range"}
