"""The models that the benchmarks run on, with random but non-trivial normalisation layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cifar_resnet
import torch
import torchvision
from torch import Tensor, nn

TRANSFORMERS = ("vit_*", "swin*", "maxvit*", "mvit*")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
SMALL_SIDE = {"alexnet": 96, "squeezenet": 96, "inception": 299}  # where 64 pixels are too few


@dataclass(frozen=True)
class Case:
    """A model of a suite.

    ``small`` is an input shape on which all checks are affordable, ``full`` the usual one.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    small: tuple[int, ...]
    full: tuple[int, ...]
    classes: int

    def model(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, every normalisation layer away from its initial state."""
        torch.manual_seed(seed)
        model = self.build()
        unsettle(model, torch.randn(2, *self.small[1:]))
        return model.eval()

    def heads(self, model: nn.Module) -> list[nn.Module]:
        """The layers that write the outputs: a peer has to be told to leave them alone."""
        return [
            module
            for module in model.modules()
            if (isinstance(module, nn.Linear) and module.out_features == self.classes)
            or (isinstance(module, nn.Conv2d) and module.out_channels == self.classes)
        ]


@torch.no_grad()
def unsettle(model: nn.Module, x: Tensor) -> None:
    """Random affine parameters; running statistics near those of real activations.

    Statistics drawn without looking at activations let these explode or vanish with depth, and
    a network whose output does not depend on its input verifies nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if "Norm" in type(module).__name__ and isinstance(weight, Tensor):
            weight.uniform_(0.75, 1.25)
            if isinstance(bias, Tensor):
                bias.uniform_(-0.25, 0.25)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):  # 1e-6 initially: the block would hardly count
            parameter.uniform_(0.25, 0.5)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        var.mul_(torch.empty_like(var).uniform_(0.75, 1.25)).add_(0.05)
        mean.add_(var.sqrt() * torch.empty_like(mean).uniform_(-0.25, 0.25))


def _image(name: str) -> Case:
    models = torchvision.models
    full = 299 if name == "inception_v3" else 224
    side = SMALL_SIDE.get(name.partition("_")[0].rstrip("0123456789"), 64)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return Case(
        name,
        "classification",
        lambda: models.get_model(name, weights=None, **options),
        (1, 3, side, side),
        (1, 3, full, full),
        1000,
    )


def _segmentation(name: str) -> Case:
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    return Case(
        name,
        "segmentation",
        lambda: torchvision.models.get_model(name, weights=None, weights_backbone=None, **options),
        (1, 3, 64, 64),
        (1, 3, 224, 224),
        21,
    )


def _video(name: str) -> Case:
    return Case(
        name,
        "video",
        lambda: torchvision.models.get_model(name, weights=None),
        (1, 3, 14, 224, 224) if name == "s3d" else (1, 3, 8, 64, 64),
        (1, 3, 16, 224, 224) if name == "s3d" else (1, 3, 16, 112, 112),
        400,
    )


def _cifar(depth: int) -> Case:
    build = cifar_resnet.resnet(depth)
    shape = (1, 3, 32, 32)
    return Case(f"cifar_resnet{depth}", "CIFAR", build, shape, shape, 10)


def torchvision_suite() -> list[Case]:
    """Every convolutional classifier, segmentation and video model of torchvision."""
    models = torchvision.models
    names = [
        name
        for name in models.list_models(module=models)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in TRANSFORMERS)
    ]
    return [
        *map(_image, names),
        *map(_segmentation, models.list_models(module=models.segmentation)),
        *map(_video, VIDEO),
        *map(_cifar, (20, 32, 44, 56, 110)),
    ]


SUITES: dict[str, Callable[[], list[Case]]] = {"torchvision": torchvision_suite}


def cases(suite: str, patterns: Iterable[str] = ("*",)) -> list[Case]:
    """The models of a suite whose names match one of the patterns."""
    patterns = list(patterns)
    return [
        case
        for case in SUITES[suite]()
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
