"""Files of 8 bits: sizes, likeness to the float file, what is told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graphprune.cli.int8 import arrays_of, check_int8
from graphprune.deploy import export, quantize, timing
from graphprune.deploy.engines import Engine
from graphprune.deploy.likeness import compared, fed, named_arrays
from graphprune.errors import ExportError, InputError, PruningWarning

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's exporters


class Net(nn.Module):
    """A convolution and a product, of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).relu().mean((2, 3)))


def data(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    def images() -> Tensor:  # of many classes
        return torch.randn(8, 3, 8, 8) + 2 * torch.randn(8, 3, 1, 1)

    return [(images(), torch.randint(0, 4, (8,))) for _ in range(count)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra is not installed")
    torch.manual_seed(0)
    net = Net()
    nn.init.zeros_(net.head.bias)
    path = tmp_path_factory.mktemp("files") / "net.onnx"
    return export(net, path, torch.randn(1, 3, 8, 8)).path


def test_static_quantization_stays_near_the_float_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(timing, "_TURN", 0.0)
    given = data()
    made = quantize(file, tmp_path / "net.int8.onnx", given, beside={"again": file}, seconds=0.001)
    assert capfd.readouterr() == ("", "")
    assert made.mode == "static"
    assert made.operators == {"Conv": 1, "Gemm": 1}
    assert made.likeness is not None
    assert 0 < made.likeness.error < 0.05
    assert made.likeness.items == 16
    assert made.likeness.agreement is not None
    assert made.likeness.agreement > 0.8
    assert made.likeness.before is not None
    assert made.timed is not None
    assert [row.name for row in made.timed.rows] == ["again", "net.onnx", "net.int8.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["net.int8.onnx"]
    assert "top-1 agreement" in str(made)


def test_wrong_ranges_are_seen(file: Path, tmp_path: Path) -> None:
    """Ranges from values a hundred times too small cut everything off."""
    narrow = [(x / 100, y) for x, y in data()]
    made = quantize(file, tmp_path / "net.int8.onnx", narrow, test=data())
    assert made.likeness is not None
    assert made.likeness.error > 0.3


def test_dynamic_quantization_needs_no_data(file: Path, tmp_path: Path) -> None:
    made = quantize(file, tmp_path / "net.int8.onnx")
    assert made.mode == "dynamic"
    assert made.operators == {"MatMul": 1}
    assert made.likeness is None
    with pytest.raises(ExportError, match="can be quantized"):
        quantize(file, tmp_path / "other.onnx", operators=["LSTM"])
    assert [path.name for path in tmp_path.iterdir()] == ["net.int8.onnx"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "static"}, "static quantization needs data"),
        ({"mode": "half"}, "mode must be 'static' or 'dynamic'"),
        ({"method": "mean"}, "method must be one of minmax, entropy, percentile"),
        ({"out": "net.tflite"}, "out must end in .onnx"),
        ({"data": data(), "keep": ["nothing"]}, "keep names 'nothing', which is no node of"),
        ({"data": data(), "keep": "Conv"}, "keep must be a list of texts"),
        ({"data": data(), "operators": "Conv"}, "operators must be a list of texts"),
        ({"data": data(), "beside": {"a": 3}}, "beside must be modules and files by name"),
        ({"data": data(), "seconds": -1}, "seconds must be a number"),
        ({"data": data(), "threads": 1.5}, "threads must be positive ints"),
        ({"out": "same"}, "out must be another file"),
        ({"data": torch.randn(1, 3, 8, 8)}, "pass [batch]"),
        ({"data": iter(data())}, "gone through more than once"),
        (
            {"data": [(torch.randn(1, 3, 8, 8), torch.randn(1)), {"a": torch.ones(1)}]},
            "takes image",
        ),
    ],
)
def test_mistakes_are_told(file: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    out = options.pop("out", "net.int8.onnx")
    out = file if out == "same" else tmp_path / out
    with pytest.raises(InputError) as caught:
        quantize(file, out, **options)
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def engine(change: Any) -> Engine:
    return Engine("an engine", ("x",), lambda t: [change(t[0])], lambda t: lambda: None)


def test_agreement_accuracy_and_what_means_nothing() -> None:
    x = torch.eye(4)
    same, turned = engine(lambda t: 2 * t), engine(lambda t: 2 * t[[0, 1, 3, 2]])
    found = compared(same, turned, [(x, torch.arange(4)), (x, torch.tensor([0, 1, 3, 2]))])
    assert (found.items, found.agreement) == (8, 0.5)
    assert (found.before, found.after) == (0.75, 0.75)
    assert found.error == pytest.approx((8 * 4 / (8 * 4)) ** 0.5)
    assert not found.told
    one = engine(lambda t: torch.ones(4, 3) * torch.arange(3.0))
    found = compared(one, one, [x])
    assert found.agreement == 1
    assert "finds one class for 100 %" in found.told
    assert "the agreement means nothing" in str(found)
    found = compared(*[engine(lambda t: t.view(1, 4, 4))] * 2, [x])
    assert found.agreement is None
    assert found.before is None


class Attending(nn.Module):
    """A table, attention under a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        x = self.words(words)
        scores = self.mix(x) @ x.transpose(1, 2)
        low = (1 - mask[:, None].to(x.dtype)) * torch.finfo(x.dtype).min
        return self.head(((scores + low).softmax(-1) @ x).mean(1))


def test_attention_stays_in_float_but_for_its_products(file: Path, tmp_path: Path) -> None:
    """The range of a mask would leave nothing of the scores that it is added to."""
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).expand(8, 6)
    given = [((torch.randint(0, 20, (8, 6)), mask),) for _ in range(3)]
    sizes = {"batch": 0, "length": 1}
    model = Attending()
    nn.init.normal_(model.head.weight, std=2.0)
    path = export(model, tmp_path / "words.onnx", given[0][0], dynamic=sizes).path
    made = quantize(path, tmp_path / "static.onnx", given)
    assert set(made.operators) <= {"MatMul", "Gemm"}
    assert made.likeness is not None
    assert made.likeness.error < 0.1
    made = quantize(path, tmp_path / "dynamic.onnx", test=given)
    assert made.operators["Gather"] == 1
    assert made.likeness is not None
    assert made.likeness.error < 0.1
    other = [*given, ((given[0][0][0][:, :4], given[0][0][1][:, :4]),)]
    with pytest.raises(InputError, match="'percentile' needs batches of one shape"):
        quantize(path, tmp_path / "other.onnx", other, method="percentile")


def test_one_class_warns(file: Path, tmp_path: Path) -> None:
    same = torch.randn(1, 3, 8, 8).expand(8, 3, 8, 8)
    with pytest.warns(PruningWarning, match="means nothing"):
        quantize(file, tmp_path / "net.int8.onnx", [same])


def test_batches_by_name_and_from_files(tmp_path: Path) -> None:
    a, b, y = torch.randn(5, 2), torch.arange(10).view(5, 2), torch.arange(5)
    assert [torch.equal(x, z) for x, z in zip(fed({"b": b, "a": a, "labels": y}, "ab"), (a, b))]
    with pytest.raises(InputError, match="the file takes a, b; got a batch"):
        fed({"a": a}, "ab")
    found = named_arrays({"b": b, "a": a, "labels": y}, ["a", "b"], 2)
    assert [len(batch[0][0]) for batch in found] == [2, 2, 1]
    assert torch.equal(found[2][0][1], b[4:])
    assert torch.equal(found[2][1], y[4:])
    with pytest.raises(InputError, match="the data hold a, but the file takes a, b"):
        named_arrays({"a": a}, ["a", "b"], 2)
    with pytest.raises(InputError, match="different numbers of items"):
        named_arrays({"a": a, "b": b[:3]}, ["a", "b"], 2)
    np.savez(tmp_path / "x.npz", a=a.numpy(), labels=y.numpy())
    save_file({"a": a}, tmp_path / "x.safetensors")
    np.save(tmp_path / "x.npy", a.numpy())
    assert torch.equal(arrays_of(tmp_path / "x.npz")["labels"], y)
    assert torch.equal(arrays_of(tmp_path / "x.safetensors")["a"], a)
    (whole,) = named_arrays(arrays_of(tmp_path / "x.npy"), ["image"], 8)
    assert torch.equal(whole[0][0], a)
    (tmp_path / "x.txt").write_text("no arrays")
    with pytest.raises(InputError, match="cannot read arrays"):
        arrays_of(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((None, Path("a.onnx"), Path("x.npz")), "--data is for --int8 static"),
        (("half", Path("a.onnx"), None), "--int8 is static or dynamic"),
        (("dynamic", Path("a.pt2"), None), "--int8 is for ONNX"),
        (("static", Path("a.onnx"), None), "--int8 static needs --data"),
        (("static", Path("a.onnx"), Path("no.npz")), "no file 'no.npz'"),
    ],
)
def test_options_that_lack_others(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_int8(*arguments)
