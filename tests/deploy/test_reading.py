"""Files of ONNX read as modules: equal to the file, made smaller, written back, or refused."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exported import Attention, Residual, Shuffled, write
from support.onnx_samples import SAMPLES, Sample
from torch import nn

import graphprune
from graphprune.deploy import export, from_onnx
from graphprune.deploy.reading.door import TABLE
from graphprune.deploy.reading.source import source_of
from graphprune.errors import InputError, ModelError, VerificationError
from graphprune.plan.plan import plan_of

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
    return write(model, inputs, folder / "net.onnx", exporter, **more)


def randomized(model: nn.Module) -> nn.Module:
    """The same with statistics and biases that are no two alike."""
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 0.9) if tensor.dim() == 1 else nn.init.normal_(tensor)
    return model.eval()


@pytest.mark.parametrize("exporter", [pytest.param("script", marks=pytest.mark.slow), "dynamo"])
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
    for one, other in ((small, copy.deepcopy(small)), (model, pickle.loads(pickle.dumps(model)))):
        assert torch.equal(other(x), one(x))
        assert source_of(other) == source_of(model)
    small.fc.eval()
    small.first.train()
    copied = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(small))))
    again = pickle.loads(pickle.dumps(copied))
    assert [m.training for m in again.modules()] == [m.training for m in copied.modules()]
    assert source_of(again) == source_of(model)
    assert plan_of(again) == plan_of(small) is not None
    small.eval()
    assert torch.equal(again.eval()(x), small(x))
    made = export(again, tmp_path / "again.onnx", x)
    assert [port.name for port in (*made.inputs, *made.outputs)] == ["x", "y"]
    assert isinstance(made.inputs[0].shape[0], str)


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


def words(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length - 2 :] = 0
    return torch.randint(0, 20, (2, length)), mask


@pytest.mark.parametrize("exporter", ["script", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_sizes_from_shapes_follow_and_open_ones_stay_open(tmp_path: Path, exporter: str) -> None:
    net, given = randomized(Attention()), words(6)
    opened = {name: {0: "batch", 1: "length"} for name in ("words", "mask")}
    path = file_of(net, given, tmp_path, exporter, names=("words", "mask"), opened=opened)
    model = from_onnx(path, given)
    assert isinstance(model.words, nn.Embedding)
    small = graphprune.rebuild(model, 0.5, given)
    assert graphprune.verify(model, small, given).verdict == "equal"
    of_torch = graphprune.rebuild(net, 0.5, given)
    for name in ("qkv", "out", "wide", "narrow", "head"):
        assert small.get_submodule(name).weight.shape == of_torch.get_submodule(name).weight.shape
    assert graphprune.verify(model, small, words(9)).verdict == "equal"
    if exporter == "dynamo":
        return
    made = export(small, tmp_path / "small.onnx", given)
    assert [port.name for port in made.inputs] == ["words", "mask"]
    assert all(isinstance(size, str) for port in made.inputs for size in port.shape)


@pytest.mark.parametrize("exporter", ["script", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_channels_that_are_shuffled_split_and_joined(tmp_path: Path, exporter: str) -> None:
    net, x = randomized(Shuffled()), torch.randn(2, 3, 6, 6)
    model = from_onnx(file_of(net, (x,), tmp_path, exporter), x)
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-4)
    small, of_torch = (graphprune.rebuild(m, 0.5, x) for m in (model, net))
    assert graphprune.verify(model, small, x).verdict == "equal"
    assert [p.shape for p in small.parameters()] == [p.shape for p in of_torch.parameters()]


def saved(folder: Path, nodes: list[object], *, opset: int = 20, **more: object) -> Path:
    """A file by hand, from x to y, both of three floats."""
    helper = onnx.helper
    kind = more.pop("kind", onnx.TensorProto.FLOAT)
    shape = more.pop("shape", (2, 3))
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_empty_tensor_value_info("y")],
        **more,
    )
    domains = {node.domain for node in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 8
    onnx.save(model, folder / "by_hand.onnx")
    return folder / "by_hand.onnx"


def node(op: str, inputs: tuple[str, ...] = ("x",), **attributes: object) -> object:
    return onnx.helper.make_node(op, inputs, ["y"], name="the_node", **attributes)


def branch(folder: Path) -> Path:
    inside = onnx.helper.make_graph(
        [node("Relu")], "inside", [], [onnx.helper.make_empty_tensor_value_info("y")]
    )
    flag = onnx.numpy_helper.from_array(np.array(True), "flag")
    made = node("If", ("flag",), then_branch=inside, else_branch=inside)
    return saved(folder, [made], initializer=[flag])


def without_data(folder: Path) -> Path:
    weight = onnx.numpy_helper.from_array(np.ones((3, 400), np.float32), "w")
    path = saved(folder, [node("MatMul", ("x", "w"))], initializer=[weight])
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0
    )
    (folder / "w.data").unlink()
    return path


def damaged(folder: Path) -> Path:
    path = saved(folder, [node("Relu")])
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    return path


def without_text(folder: Path, before: bytes, after: bytes) -> Path:
    weight = onnx.numpy_helper.from_array(np.ones((3, 4), np.float32), "0.weight")
    path = saved(folder, [node("MatMul", ("x", "0.weight"))], initializer=[weight])
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after))
    return path


def from_values(folder: Path) -> Path:
    return saved(folder, [node("Reshape", ("x", "x"))], kind=onnx.TensorProto.INT64, shape=(2,))


def resized(folder: Path, by: int = 2, mode: str = "nearest", **attributes: object) -> Path:
    scales = onnx.numpy_helper.from_array(np.array([1, 1, by, by], np.float32), "s")
    places = "asymmetric" if mode == "nearest" else "half_pixel"
    made = node("Resize", ("x", "", "s"), mode=mode, coordinate_transformation_mode=places,
                **attributes)  # fmt: skip
    return saved(folder, [made], initializer=[scales], shape=(1, 2, 4, 4))


def test_halves_of_a_doubled_image_go_down(tmp_path: Path) -> None:
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(from_onnx(resized(tmp_path))(x), expected)


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(-1, -99, -1), (99, -99, -2), (-99, -100, -1), (-2, 0, -1), (3, 2**40, -1), (2, -4, -1),
     (2**40, -(2**40), -1), (1, -(2**40), -1), (99, 100, 1), (2**40, 2**41, 1), (-99, 3, 2),
     (0, -(2**40), 1)],
)  # fmt: skip
def test_slices_outside_are_brought_to_the_edge(
    tmp_path: Path, start: int, end: int, step: int
) -> None:
    names = {"starts": start, "ends": end, "axes": 1, "steps": step}
    given = [onnx.numpy_helper.from_array(np.array([n]), name) for name, n in names.items()]
    path = saved(tmp_path, [node("Slice", ("x", *names))], initializer=given, shape=(2, 5))
    x = torch.arange(10.0).reshape(2, 5)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x.numpy()})
    found = from_onnx(path, check=False)(x)
    assert torch.equal(found, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder / "absent.onnx", "no file"),
        (damaged, "cannot be read as ONNX"),
        (without_data, "w.data"),
        *((lambda f, old=old, new=new: without_text(f, old, new), "is damaged: a name")
          for old, new in ((b"0.weight", b"0.weigh\xff"), (b"the_node", b"the_nod\xff"),
                           (b"MatMul", b"MatMu\xff"), (b"\x01x", b"\x01\xff"),
                           (b"\x01y", b"\x01\xff"), (b"by hand", b"by han\xff"))),
        (branch, "If 'the_node'.*control flow"),
        (lambda f: saved(f, [node("NonZero")]), "NonZero 'the_node'.*none of Abs, "),
        (lambda f: saved(f, [node("FusedConv", domain="com.microsoft")]),
         "com.microsoft::FusedConv 'the_node'.*another domain"),
        (lambda f: saved(f, [node("DynamicQuantizeLinear")]), "is quantized"),
        (lambda f: saved(f, [node("Relu")], opset=6), "opset 6; opsets 9 to"),
        (lambda f: saved(f, [node("Relu")], shape=None), "how many dimensions"),
        (from_values, "Reshape 'the_node'.*computed from values"),
        (lambda f: saved(f, [node("MaxPool", kernel_shape=[1] * 4)], shape=(1,) * 6),
         "MaxPool 'the_node'.*4 dimensions"),
        *((lambda f, more=more: resized(f, **more), f"Resize 'the_node'.*{why}") for more, why in (
            ({"nearest_mode": "ceil"}, "nearest_mode 'ceil'"),
            ({"nearest_mode": "round_prefer_ceil"}, "nearest_mode 'round_prefer_ceil'"),
            ({"by": 3}, "nearest_mode 'round_prefer_floor'"),
            ({"mode": "cubic", "cubic_coeff_a": -0.5}, "cubic_coeff_a=-0.5"),
            ({"mode": "cubic", "exclude_outside": 1}, "exclude_outside=1"),
            ({"mode": "linear", "antialias": 1}, "antialias=1"),
            ({"mode": "linear", "keep_aspect_ratio_policy": "not_larger"}, "not_larger"),
            ({"mode": "linear", "axes": [0, 1, 2, 3]}, "axes="),
        )),
        (lambda f: saved(f, [node("IsInf", detect_negative=0)]), "IsInf.*detect_negative=0"),
        (lambda f: saved(f, [node("Relu", alpha=2.0)]), "Relu 'the_node'.*alpha=2.0"),
        (lambda f: saved(f, [node("Dropout", ("x", "", "t"))], initializer=[
            onnx.numpy_helper.from_array(np.array(True), "t")]), "Dropout 'the_node'.*training"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told(tmp_path: Path, make: Any, told: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){told}"):
        from_onnx(make(tmp_path))


def test_a_wrong_reading_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, [node("Relu")])
    monkeypatch.setitem(TABLE, "Relu", TABLE["Tanh"])
    with pytest.raises(VerificationError, match="computes something else"):
        from_onnx(path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, [node("Relu")])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r'pip install "graphprune\[onnx\]"'):
        from_onnx(path)


def test_weights_that_layers_share_stay_shared(tmp_path: Path) -> None:
    helper, weight = onnx.helper, np.random.default_rng(0).standard_normal((7, 3))
    table = onnx.numpy_helper.from_array(weight.astype(np.float32), "table.weight")
    nodes = [
        helper.make_node("Gather", ["table.weight", "x"], ["rows"]),
        helper.make_node("Transpose", ["table.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"]),
    ]
    path = saved(tmp_path, nodes, initializer=[table], kind=onnx.TensorProto.INT64)
    model = from_onnx(path)
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 3)]
    product = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
    assert product.weight is model.table.weight
