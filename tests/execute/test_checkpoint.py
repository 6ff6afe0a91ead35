"""Saving and loading: the loaded model is the saved one, and every misfit is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import graphprune
from graphprune.errors import CheckpointError, InputError
from graphprune.execute.checkpoint import load, save


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


class Tied(nn.Module):
    """An embedding whose weight is the last layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x) + self.mix(self.embed(x)))


class Buffers(nn.Module):
    """A saved and an unsaved buffer on the channels, and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)
        self.register_buffer("scale", torch.linspace(1, 2, 8))
        self.register_buffer("offset", torch.linspace(-1, 1, 8), persistent=False)
        self.factor = torch.tensor(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale + self.offset) * self.factor


class Reading(nn.Module):
    """Reads values while it is built, which cannot be done on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [float(rate) for rate in torch.linspace(0.5, 1, 2)]
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.rates[0]


def parametrized() -> nn.Module:
    net = mlp()
    parametrizations.weight_norm(net[0])
    return net


def channels_last() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    return net.to(memory_format=torch.channels_last)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, torch.randn(2, 6)),
    "tied": (Tied, torch.arange(6).view(2, 3)),
    "buffers": (Buffers, torch.randn(2, 4)),
    "reading": (Reading, torch.randn(2, 6)),
    "parametrized": (parametrized, torch.randn(2, 6)),
    "channels_last": (channels_last, torch.randn(2, 2, 9, 9)),
    "versioned": (torchvision.models.mnasnet0_5, torch.randn(1, 3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, torch.randn(1, 3, 64, 64)),
}


def other(factory: Callable[[], nn.Module]) -> nn.Module:
    """The same architecture with other weights."""
    model = factory()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("source", ["model", "factory"])
def test_the_loaded_model_is_the_saved_one(name: str, source: str, tmp_path: Path) -> None:
    factory, x = CASES[name]
    torch.manual_seed(0)
    small = graphprune.rebuild(factory(), 0.5, x).eval()
    assert small.graphprune_plan.removed
    path = save(small, tmp_path / "small.safetensors")
    original = other(factory)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    loaded = load(path, original if source == "model" else factory).eval()
    assert torch.equal(loaded(x), small(x))
    assert loaded.graphprune_plan == small.graphprune_plan
    assert str(loaded) == str(small)
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in small.named_parameters()]
    for key, value in original.state_dict().items():
        assert torch.equal(value, before[key])
    assert not hasattr(original, "graphprune_plan")


def test_a_tied_tensor_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    path = save(graphprune.rebuild(Tied(), 0.5, CASES["tied"][1]), tmp_path / "s")
    assert "out.weight" not in load_file(path)
    loaded = load(path, Tied)
    assert loaded.out.weight is loaded.embed.weight


def test_dtype_comes_from_the_file(tmp_path: Path) -> None:
    small = graphprune.rebuild(Buffers(), 0.5).to(torch.bfloat16).eval()
    loaded = load(save(small, tmp_path / "s"), Buffers).eval()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert loaded.first.weight.dtype == loaded.offset.dtype == torch.bfloat16
    assert torch.equal(loaded(x), small(x))


def test_requires_grad_attributes_and_mode_come_from_the_model(tmp_path: Path) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    original = mlp().eval()
    original[0].weight.requires_grad_(False)
    original[2].bias.no_decay = True
    loaded = load(path, original)
    assert not loaded[0].weight.requires_grad
    assert loaded[2].weight.requires_grad
    assert loaded[2].bias.no_decay
    assert not loaded.training


def test_memory_format_is_kept(tmp_path: Path) -> None:
    factory, x = CASES["channels_last"]
    small = graphprune.rebuild(factory(), 0.5, x)
    loaded = load(save(small, tmp_path / "s"), factory)
    assert loaded[0].weight.stride() == small[0].weight.stride()


def test_a_model_on_meta_is_enough_unless_values_are_missing(tmp_path: Path) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    with torch.device("meta"):
        model, buffers = mlp(), Buffers()
    assert not any(p.is_meta for p in load(path, model).parameters())
    path = save(graphprune.rebuild(Buffers(), 0.5), tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"2 tensors outside its state_dict.*meta"):
        load(path, buffers)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    path = save(graphprune.rebuild(Buffers(), 0.5), tmp_path / "s")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load(path, Buffers)
    assert torch.equal(torch.rand(3), expected)


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = graphprune.rebuild(mlp(), 0.5)
    path = save(small, tmp_path / "s")
    content = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("graphprune.execute.checkpoint.save_file", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save(small, path)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert path.read_bytes() == content


def test_a_loaded_model_can_be_saved_over_its_own_file(tmp_path: Path) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    loaded = load(path, mlp)
    save(loaded, path)
    x = torch.randn(2, 6)
    assert torch.equal(load(path, mlp)(x), loaded(x))


def test_no_plan_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made by rebuild, got Sequential"):
        save(mlp(), tmp_path / "s")


class Extra(nn.Linear):
    """Has state that only pickle could store."""

    def get_extra_state(self) -> object:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        pass


def test_state_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    small = graphprune.rebuild(nn.Sequential(Extra(4, 6), nn.Linear(6, 2)), 0.5)
    with pytest.raises(CheckpointError, match=r"'0._extra_state' is a dict.*pickle"):
        save(small, tmp_path / "s")


def misfit(text: str) -> Callable[[], nn.Module]:
    return {
        "names": lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.ReLU(), nn.Linear(10, 3)),
        "shape": lambda: nn.Sequential(nn.Linear(7, 10), nn.ReLU(), nn.Linear(10, 3)),
        "width": lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)),
        "none": lambda: 3,
    }[text]


@pytest.mark.parametrize(
    ("case", "kind", "pattern"),
    [
        ("names", CheckpointError, r"missing in the file: 3.weight, 3.bias; not in the model: 2"),
        ("shape", CheckpointError, r"0.weight is \[5, 6\] in the file.* \[5, 7\] in the model"),
        ("width", CheckpointError, r"expects '0.weight' with size 10 in dimension 0.*\[12, 6\]"),
        ("none", InputError, "returned a int instead of a module"),
    ],
)
def test_a_file_that_does_not_fit_says_what_differs(
    case: str, kind: type[Exception], pattern: str, tmp_path: Path
) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    with pytest.raises(kind, match=pattern):
        load(path, misfit(case))


def test_the_small_model_is_not_the_original(tmp_path: Path) -> None:
    small = graphprune.rebuild(mlp(), 0.5)
    path = save(small, tmp_path / "s")
    with pytest.raises(CheckpointError, match="pass the model before rebuild"):
        load(path, small)
    with pytest.raises(InputError, match="expected a model or a function that makes one, got int"):
        load(path, 3)


def rewritten(path: Path, **changes: str | None) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(path), path, metadata=kept)
    return path


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"format": None}, "holds tensors but no graphprune plan"),
        ({"version": "99"}, "format version '99'; this graphprune reads version 1"),
        ({"plan": "{}"}, "does not match its digest"),
        ({"aliases": None}, "is damaged"),
    ],
)
def test_foreign_metadata_is_refused(
    changes: dict[str, str | None], pattern: str, tmp_path: Path
) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    with pytest.raises(CheckpointError, match=pattern):
        load(rewritten(path, **changes), mlp)


@pytest.mark.parametrize("damage", ["bit", "cut", "text", "empty", "folder", "nothing"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
    path.write_bytes({"cut": content[:-8], "text": b"hello", "empty": b""}.get(damage, content))
    path = {"folder": tmp_path, "nothing": tmp_path / "none"}.get(damage, path)
    with pytest.raises(CheckpointError, match=str(path)):
        load(path, mlp)


def test_the_metadata_is_plain_json(tmp_path: Path) -> None:
    small = graphprune.rebuild(Tied(), 0.5, CASES["tied"][1])
    with safe_open(save(small, tmp_path / "s"), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["aliases"]) == {"out.weight": "embed.weight"}
    assert graphprune.Plan.from_json(metadata["plan"]) == small.graphprune_plan


def test_a_factory_that_needs_arguments_is_told(tmp_path: Path) -> None:
    path = save(graphprune.rebuild(mlp(), 0.5), tmp_path / "s")
    with pytest.raises(InputError, match=r"Linear needs in_features, out_features: .*lambda"):
        load(path, nn.Linear)

    def broken() -> nn.Module:
        raise RuntimeError("no weights here")

    with pytest.raises(InputError, match=r"the function that makes the model fails .*no weights"):
        load(path, broken)


class Scaled(nn.Module):
    """A parameter that a hook holds as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.rand(6) + 1)
        self.first.register_forward_hook(Times(self.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


class Times:
    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        return out * self.scale


def test_hooks_hold_the_values_of_the_file(tmp_path: Path) -> None:
    model, x = Scaled(), torch.randn(3, 4)
    small = graphprune.rebuild(model, 0.5, x)
    path = save(small, tmp_path / "s")
    for source in (Scaled(), Scaled):
        loaded = load(path, source)
        assert torch.equal(loaded(x), small(x))
        (hook,) = loaded.first._forward_hooks.values()
        assert hook.scale is loaded.scale
