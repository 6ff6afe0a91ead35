"""Small models leave eager Python as the originals do: compiled, exported, as ONNX, copied, saved.

The sample holds convolutional, attention and recurrent models of torchvision, torch and
transformers. Whatever works on the original works on the small model, with equal outputs.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from support.comparing import assert_close, assert_same_state, call
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's exporters
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:contextlib"),
    pytest.mark.filterwarnings(r"ignore::RuntimeWarning:torch\b"),  # of some versions of Python
]


class Tagger(nn.Module):
    """A bidirectional LSTM over embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(self.lstm(self.words(words))[0])


class PaddedBlock(nn.Module):
    """A residual block whose shortcut has no parameters: it pads by a number in the code."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        planes = width * stride
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.pad = (planes - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, y.shape[1] - x.shape[1] - self.pad))
        return F.relu(y + x)


class PaddedShortcut(nn.Module):
    """A shortcut padded by literals: the small model has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class CifarResNet(nn.Module):
    """Shortcuts padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(PaddedBlock(8, 1), PaddedShortcut(), PaddedBlock(16, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Two levels, a skip connection, an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._pair(3, 8), self._pair(8, 16)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), self._pair(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _pair(width: int, planes: int) -> nn.Sequential:
        conv = nn.Conv2d(width, planes, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(planes), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        return self.head(self.last(torch.cat([fine, self.up(coarse)], 1)))


class Logits(nn.Module):
    """A language model that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        return self.model(input_ids=words).logits


def words() -> Tensor:
    """Two sequences of word numbers."""
    return torch.randint(0, 30, (2, 9))


def image(side: int = 32) -> Tensor:
    """Two images."""
    return torch.randn(2, 3, side, side)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [2, 2], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.1, num_classes=10
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(30, 32), layers, nn.Linear(32, 5))


def language(kind: str, task: str, **options: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, use_cache=False, **options,
    )  # fmt: skip
    return Logits(getattr(transformers, f"{kind}For{task}")(config))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), image),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), image),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10), image),
    "vit": (vit, image),
    "swin": (swin, image),
    "lstm": (Tagger, words),
    "encoder": (encoder, words),
    "cifar_resnet": (CifarResNet, image),
    "unet": (UNet, image),
    "llama": (lambda: language("Llama", "CausalLM", num_key_value_heads=2), words),
    "bert": (lambda: language("Bert", "MaskedLM", max_position_embeddings=16), words),
}
NOT_WHOLE = {"lstm"}  # torch.compile leaves the layer to eager mode
QUICK = {
    "compile": {"vit", "cifar_resnet"},
    "export": {"vit", "cifar_resnet"},
    "onnx": {"cifar_resnet"},
}


def compiled(model: nn.Module, x: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """The model captured by torch.compile, without a break in the graph."""
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=name not in NOT_WHOLE)


def exported(model: nn.Module, x: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """The model after torch.export for any batch size, saved and loaded."""
    batch = ({0: torch.export.Dim.DYNAMIC},)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=batch), file)
    file.seek(0)
    return torch.export.load(file).module()


def through_onnx(model: nn.Module, x: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """The model in onnxruntime."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="the onnx extra is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    program: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {source: x.numpy()})[0])


WAYS = {"compile": compiled, "export": exported, "onnx": through_onnx}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with no parameter that is zero throughout, its small one, and an input."""
    build, draw = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), draw()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    small = graphprune.rebuild(model, 0.5, x)
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert parameters[1] < 0.4 * parameters[0]
    return model, small, x


def cases() -> list[Any]:
    """All ways with all models; the expensive ones outside the default run."""
    return [
        pytest.param(way, name, marks=() if name in QUICK[way] else pytest.mark.slow)
        for way in WAYS
        for name in MODELS
    ]


@pytest.mark.parametrize(("way", "name"), cases())
def test_what_works_on_the_original_works_on_the_small_model(way, name):
    original, small, x = pair(name)
    for model in (original, small):
        taken = WAYS[way](model, x, name)
        batches = [x, torch.cat([x, x[:1]])] if way == "export" else [x]
        for batch in batches:
            wanted = call(model, batch)
            assert wanted.abs().max() > 0
            assert_close(wanted, call(taken, batch), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_copied_pickled_saved_and_shrunk_again(name, tmp_path):
    _, small, x = pair(name)
    wanted = call(small, x)
    clone = copy.deepcopy(small)
    assert_same_state(small, clone)
    assert torch.equal(call(clone, x), wanted)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(call(small, x), wanted), "the copy shares something with the model"

    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(call(torch.load(file, weights_only=False), x), wanted)

    path = graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(path, MODELS[name][0]).eval()
    assert_same_state(small, loaded)
    assert torch.equal(call(loaded, x), wanted)

    smaller = graphprune.rebuild(loaded, 0.5, x)
    assert call(smaller, x).shape == wanted.shape
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, smaller)]
    assert counts[1] < 0.6 * counts[0]


def test_a_model_with_a_forward_of_its_own_is_shrunk_twice():
    model, small, x = pair("cifar_resnet")
    assert small.graphprune_plan.literals
    assert graphprune.verify(model, small, x).difference <= 1e-10
    for start in (small, copy.deepcopy(small)):
        smaller = graphprune.rebuild(start, 0.5, x)
        assert smaller.graphprune_plan.literals
        assert graphprune.verify(model, smaller, x).difference <= 1e-10
