"""Packages of machine code: written by torch's compiler, compared like all others."""

import shutil
import zipfile

import pytest
import torch
from torch import nn

import graphprune
from graphprune.deploy import bench, engines, export, programs
from graphprune.errors import ExportError, InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # inside torch's compiler
]
COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_a_small_model_as_machine_code(tmp_path):
    model, x = net(), torch.randn(1, 4)
    small = graphprune.rebuild(model, 0.5, x)
    path = tmp_path / "small.pt2"
    made = export(small, path, x, compiled=True, original=model)
    assert (made.verdict, made.format) == ("equal", "AOTInductor")
    assert programs.MACHINE in made.notes
    assert str(made.inputs[0]) == "input float32[batch, 4]"
    assert engines.is_compiled(path)
    engine = engines.load_engine(path)
    rows = torch.randn(5, 4)
    torch.testing.assert_close(engine.run([rows])[0], small(rows))
    for wrong in (torch.randn(5, 3), torch.randn(5, 4).double(), torch.randn(4)):
        with pytest.raises(ExportError, match=r"input is float32\[batch, 4\] in the package; got"):
            engine.run([wrong])
    with pytest.raises(ExportError, match="takes 1 inputs; got 2"):
        engine.run([rows, rows])
    assert str(bench({"file": path}, seconds=0.05)).count("AOTInductor") == 1  # its own inputs


def test_what_is_no_package_is_none(tmp_path):
    path = tmp_path / "small.pt2"
    export(net(), path, torch.randn(2, 4))
    assert not engines.is_compiled(path)
    (tmp_path / "text.pt2").write_text("no archive")
    assert not engines.is_compiled(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w") as package:
        package.writestr("bad/data/aotinductor/model/x.so", "no code")
    with pytest.raises(ExportError, match=r"AOTInductor cannot load 'bad\.pt2'"):
        engines.load_engine(tmp_path / "bad.pt2")


def test_only_packages_are_compiled_and_only_with_a_compiler(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"compiled=True is about \.pt2"):
        export(net(), tmp_path / "small.onnx", torch.randn(2, 4), compiled=True)
    monkeypatch.setattr(programs.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        export(net(), tmp_path / "small.pt2", torch.randn(2, 4), compiled=True)
    assert not list(tmp_path.iterdir())


def test_sizes_of_one_name_are_equal():
    ports = (("a", torch.float32, ("n", 3)), ("b", torch.int64, ("n",)))
    engines._check_sizes(ports, [torch.ones(2, 3), torch.ones(2, dtype=torch.long)])
    with pytest.raises(ExportError, match=r"b is int64\[n\] in the package; got int64\[3\]"):
        engines._check_sizes(ports, [torch.ones(2, 3), torch.ones(3, dtype=torch.long)])
    engines._check_sizes((), [torch.ones(2)])  # a package of somebody else tells nothing
