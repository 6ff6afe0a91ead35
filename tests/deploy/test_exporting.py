"""Files for engines: what they leave open, how they compare, what is refused, what stays whole."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.deploy import bench, engines, export, exporting, quantize
from graphprune.deploy.agreeing import Comparison
from graphprune.deploy.axes import redrawn
from graphprune.deploy.engines import Engine
from graphprune.deploy.exporting import odd_widths
from graphprune.deploy.flat import Flat
from graphprune.errors import (
    ExportError,
    InputError,
    ModelError,
    PruningWarning,
    TraceError,
    VerificationError,
)
from graphprune.record.inputs import Call

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's exporters
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:contextlib"),
    pytest.mark.filterwarnings(r"ignore::RuntimeWarning:torch\b"),  # of some versions of Python
]


class Pooled(nn.Module):
    """Words, of which a mask counts some; a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 8), nn.Linear(8, 12)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(
        self, words: Tensor, mask: Tensor | None = None, *, scale: float = 1.0
    ) -> dict[str, Any]:
        x = self.body(self.words(words)).relu()
        kept = torch.ones_like(words) if mask is None else mask
        pooled = (x * kept[..., None]).sum(1) / kept.sum(1)[:, None]
        logits = scale * self.head(self.norm(pooled))
        return {"logits": logits, "parts": (2 * logits, None), "n": 3}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def sentence() -> dict[str, Any]:
    return {"words": torch.randint(0, 20, (1, 5)), "mask": torch.ones(1, 5, dtype=torch.long)}


def with_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra is not installed")


def test_a_small_model_as_a_program(tmp_path: Path) -> None:
    model = Pooled()
    small = graphprune.rebuild(model, 0.5, sentence())
    sizes = {"batch": 0, "length": {"words": 1, "mask": -1}}
    made = export(small, tmp_path / "small.pt2", sentence(), dynamic=sizes)
    assert small.body.out_features == 6
    assert made.verdict == "equal"
    assert [str(port) for port in made.inputs] == [
        "words int64[batch, length]",
        "mask int64[batch, length]",
    ]
    assert [str(port) for port in made.outputs] == [
        "logits float32[batch, 3]",
        "parts_0 float32[batch, 3]",
    ]
    assert made.agreement is not None
    assert {check.name for check in made.agreement.checks} == {
        "output, example inputs", "output, other values", "output, batch 2", "output, length 6",
    }  # fmt: skip
    other = {"words": torch.randint(0, 20, (3, 7)), "mask": torch.ones(3, 7, dtype=torch.long)}
    loaded = torch.export.load(made.path).module()
    torch.testing.assert_close(loaded(**other)["logits"], small.eval()(**other)["logits"])


@pytest.mark.parametrize("external", [False, True])
def test_a_small_model_in_onnx_runtime(tmp_path: Path, external: bool) -> None:
    with_onnx()
    import onnx
    import onnxruntime

    small = graphprune.rebuild(Pooled(), 0.5, sentence())
    made = export(
        small,
        tmp_path / "small.onnx",
        sentence(),
        dynamic={"batch": 0, "length": 1},
        outputs="logits",
        output_names="scores",
        external_data=external,
        certificate=False,
    )
    assert made.verdict == "equal"
    names = ["small.onnx", "small.onnx.data"] if external else ["small.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert made.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    (output,) = onnx.load(made.path).graph.output
    shown = [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim]
    assert (output.name, shown) == ("scores", ["batch", 3])
    other = {"words": torch.randint(0, 20, (3, 7)), "mask": torch.ones(3, 7, dtype=torch.long)}
    session = onnxruntime.InferenceSession(made.path)
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in other.items()})
    wanted = small.eval()(**other)["logits"]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_model_changes_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Pooled().train()
    model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    example = sentence()
    numbers = torch.get_rng_state(), random.getstate()
    export(model, tmp_path / "model.pt2", example)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_the_example_is_inferred_and_all_may_be_fixed(tmp_path: Path) -> None:
    made = export(net(), tmp_path / "model.pt2", dynamic=None)
    assert [str(port) for port in (*made.inputs, *made.outputs)] == [
        "input float32[1, 4]",
        "output float32[1, 2]",
    ]
    assert made.agreement is not None
    assert len(made.agreement.checks) == 2


def wrong(engine: Engine, change: Callable[[Tensor], Tensor]) -> Engine:
    return replace(engine, run=lambda tensors: [change(out) for out in engine.run(tensors)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: out * 1.001, "differs by 1.0e-03 of its size"),
        (lambda out: out.repeat(2, 1), "shape [2, 2] instead of [1, 2]"),
    ],
)
def test_what_differs_is_told_and_not_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensor], Tensor],
    told: str,
) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("an older file")
    load = exporting.load_engine
    monkeypatch.setattr(exporting, "load_engine", lambda file, **_: wrong(load(file), change))
    with pytest.raises(VerificationError) as caught:
        export(net(), path, torch.randn(1, 4))
    assert told in str(caught.value)
    assert "'output'" in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "an older file"


def test_an_engine_that_fails_at_another_size_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(out: Tensor) -> Tensor:
        if len(out) > 1:
            raise ExportError("one row only")
        return out

    load = exporting.load_engine
    monkeypatch.setattr(exporting, "load_engine", lambda file, **_: wrong(load(file), fails))
    with pytest.raises(VerificationError, match=r"fails on batch 2 .*one row only"):
        export(net(), tmp_path / "model.pt2", torch.randn(1, 4))


class Cancelling(nn.Module):
    """Loses digits: large numbers nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        large = 1000 * self.first(x).abs().sum(1, keepdim=True)
        return (x + large) - large


def test_a_difference_by_rounding_is_none_and_said() -> None:
    model, x = Cancelling().eval(), torch.randn(3, 4)
    flat = Flat(model, Call((x,)))
    exact = Flat(Cancelling().eval(), Call((x,)))
    exact.load_state_dict(flat.state_dict())
    exact.double()

    def run(factor: float) -> Engine:
        def outputs(tensors: Any) -> list[Tensor]:
            return [factor * out.float() for out in exact(*(t.double() for t in tensors))]

        return Engine("an engine", (), outputs, lambda tensors: lambda: None)

    found = Comparison(flat, ["output"], run(1.0), None, 0).all([x], [])
    assert found.verdict == "equal"
    assert "times what rounding does" in found.checks[0].note
    with pytest.raises(VerificationError, match="computes something else"):
        Comparison(flat, ["output"], run(1.05), None, 0).all([x], [])


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + torch.randn(x.shape[0], 2)


class Deaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)
        nn.init.zeros_(self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_other_values_leave_masks_as_they_are() -> None:
    ids, mask, x = torch.arange(6).view(2, 3), torch.tensor([[1, 1, 0]] * 2), torch.zeros(2, 3)
    other = redrawn([ids, mask, x], 0)
    assert torch.equal(other[0], ids.flip(-1))
    assert torch.equal(other[1], mask)
    assert other[2].unique().numel() == 6


@pytest.mark.parametrize(
    ("model", "told"), [(Drawing, "draws random numbers"), (Deaf, "the same for all inputs")]
)
def test_what_cannot_be_decided_is_said(tmp_path: Path, model: type, told: str) -> None:
    with pytest.warns(PruningWarning, match=told):
        made = export(model(), tmp_path / "model.pt2", torch.randn(3, 4))
    assert made.verdict == "not decided"
    assert told in str(made)


class Square(nn.Module):
    """Its code knows one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.body(x).reshape(4, 4)


def test_a_batch_that_the_code_fixes_is_fixed_with_a_word(tmp_path: Path) -> None:
    with pytest.warns(PruningWarning, match="the batch size is fixed at 4"):
        made = export(Square(), tmp_path / "model.pt2", torch.randn(4, 4))
    assert made.inputs[0].shape == (4, 4)
    with pytest.raises(ExportError, match="fixes a size that was to be left open"):
        export(Square(), tmp_path / "other.pt2", torch.randn(4, 4), dynamic={"batch": 0})
    assert not (tmp_path / "other.pt2").exists()


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


def test_models_that_decide_by_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Deciding decides by values of its inputs"):
        export(Deciding(), tmp_path / "model.pt2", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "suffix": ({"path": "model.tflite"}, "path must end in .onnx or .pt2"),
    "dynamic": ({"dynamic": "words"}, "dynamic must be 'batch'"),
    "no input": ({"dynamic": {"n": {"y": 0}}}, "of an input 'y'; there are input"),
    "no dim": ({"dynamic": {"n": {"input": 2}}}, "'input' has 2 dimensions; got 2"),
    "nowhere": ({"dynamic": {"n": 5}}, "no input has a dimension 5"),
    "no word": ({"dynamic": {"1": 0}}, "a name of a size must be a word"),
    "float": ({"dynamic": {"n": 0.5}}, "got 0.5 for 'n'"),
    "twice": ({"dynamic": {"n": 0, "m": -2}}, "one dimension twice"),
    "names": ({"input_names": ["a", "b"]}, "input_names must be 1 different names, for input"),
    "output": ({"outputs": "logits"}, "it is a tensor"),
    "engine": ({"engine": "tensorrt"}, "engine must be one of onnxruntime, openvino"),
    "opset": ({"opset": "20"}, "opset must be a version"),
    "no bound": ({"tolerance": float("nan")}, "tolerance must be a finite number"),
    "any bound": ({"tolerance": float("inf")}, "tolerance must be a finite number"),
    "a bound below": ({"tolerance": -1}, "tolerance must be a finite number"),
    "a bound in words": ({"tolerance": "a"}, "tolerance must be a finite number"),
    "seed": ({"seed": 2**70}, "seed must be an int of at most 64 bits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(tmp_path: Path, name: str) -> None:
    options, told = MISTAKES[name]
    path = tmp_path / options.pop("path", "model.pt2")
    with pytest.raises(InputError) as caught:
        export(net(), path, torch.randn(2, 4), **options)
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_is_not_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match="where 999 was asked for"):
        export(net(), tmp_path / "model.onnx", torch.randn(2, 4), opset=999)
    assert not list(tmp_path.iterdir())


def test_inputs_that_show_nothing_decide_nothing(tmp_path: Path) -> None:
    found = export(net(), tmp_path / "model.pt2", torch.full((2, 4), float("nan")))
    assert found.agreement is not None
    rows = {check.name: check.decided for check in found.agreement.checks}
    assert rows["output, example inputs"] is False
    assert rows["output, other values"] is True


def test_models_and_inputs_that_are_none_are_told(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(ModelError, match="must be a torch"):
        export(3, path)
    with pytest.raises(TraceError, match="does not run on"):
        export(net(), path, torch.randn(1, 5))
    with pytest.raises(ExportError, match="cannot write"):
        export(net(), tmp_path / "no" / "model.pt2", torch.randn(1, 4))
    path.mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export(net(), path, torch.randn(1, 4))


def test_the_same_file_in_openvino(tmp_path: Path) -> None:
    with_onnx()
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    x = sentence()
    made = export(
        Pooled(), tmp_path / "model.onnx", x, dynamic={"batch": 0, "length": 1}, engine="openvino"
    )
    assert made.verdict == "equal"
    assert made.agreement is not None
    assert made.agreement.engine.startswith("OpenVINO")
    timed = bench({"file": made.path}, x, seconds=0.0, engine="openvino")
    assert timed.rows[0].engine == made.agreement.engine
    with pytest.raises(InputError, match="clock must be"):
        bench({"file": made.path}, x, engine="openvino", clock="processor")


class Tagger(nn.Module):
    """Recurrent layers over embedded words; decides by a value where it is asked to."""

    def __init__(self, decides: bool = False) -> None:
        super().__init__()
        self.words, self.decides = nn.Embedding(20, 6), decides
        self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(self.lstm(self.words(words))[0])
        if self.decides and y.sum() > 0:
            y = -y
        return self.head(y), state


def test_recurrent_layers_stay_one_operator_of_any_length(tmp_path: Path) -> None:
    with_onnx()
    import onnx

    words, sizes = torch.randint(0, 20, (1, 5)), {"batch": 0, "length": 1}
    small = graphprune.rebuild(Tagger(), 0.5, words)
    made = export(small, tmp_path / "small.onnx", words, dynamic=sizes, external_data=True)
    assert made.verdict == "equal"
    assert made.outputs[0].shape == ("batch", "length", 3)
    assert "one operator each" in made.notes[0]
    kinds = [node.op_type for node in onnx.load(made.path).graph.node]
    assert (kinds.count("LSTM"), kinds.count("GRU")) == (1, 1)
    assert (tmp_path / "small.onnx.data").stat().st_size > 0
    assert quantize(made.path, tmp_path / "int8.onnx").operators["LSTM"] == 1
    with pytest.raises(ExportError, match="Tagger decides by values"):
        export(Tagger(decides=True), tmp_path / "other.onnx", words)
    assert not (tmp_path / "other.onnx").exists()


def test_widths_that_an_engine_runs_slowly_are_told() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)), torch.randn(1, 3, 8, 8)
    (told,) = odd_widths(graphprune.rebuild(model, 0.4, x), "ONNX")
    assert "1 of 2 convolutions have widths" in told
    assert "round_to=16" in told
    assert not [*odd_widths(graphprune.rebuild(model, 0.5, x), "ONNX")]
    assert not [*odd_widths(graphprune.rebuild(model, 0.4, x), "torch.export")]
    assert not [*odd_widths(nn.Conv2d(3, 19, 3), "ONNX")], "the user's own choice"


def test_a_missing_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r'pip install "graphprune\[onnx\]"'):
        engines.onnxruntime(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r'pip install "graphprune\[onnx\]"'):
        export(net(), tmp_path / "model.onnx", torch.randn(1, 4))
