"""The models that the benchmarks run on, with random parameters of which none is trivial."""

from __future__ import annotations

import fnmatch
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

SUITES = (
    "torchvision",
    "timm",
    "transformers",
    "recurrent",
    "transformers_text",
    "transformers_vision",
    "vit_pytorch",
    "segmentation_models",
    "diffusers",
    "ultralytics",
)
BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Case:
    """A model of a suite.

    ``draw(batch)`` returns inputs as ``graphprune.trace`` takes them, small enough that all
    checks are affordable; ``draw_full`` those of the usual size, where that is larger.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Any]
    classes: int  # outputs of the last layers
    draw_full: Callable[[int], Any] | None = None
    trains: bool = True  # whether the model runs in train mode on these inputs
    size: str = ""  # what the table shows of the inputs
    batch: int = 1
    head_names: tuple[str, ...] = ()  # glob patterns of further last layers
    counts: Callable[[Any], Any] | None = None  # the part of the outputs that is used

    def model(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, all parameters and statistics away from their initial state."""
        torch.manual_seed(seed)
        model = self.build()
        if self.counts is not None:
            model = Used(model, self.counts)
        unsettle(model, self.draw(2), self.trains)
        return model.eval()

    def full(self) -> Any:
        """Inputs of the usual size."""
        return (self.draw_full or self.draw)(self.batch)

    def heads(self, model: nn.Module) -> list[nn.Module]:
        """The layers that write the outputs: a peer has to be told to leave them alone."""
        return [
            module
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) and module.out_features == self.classes)
            or (isinstance(module, nn.Conv2d) and module.out_channels == self.classes)
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.head_names)
        ]


class Used(nn.Module):
    """A model of which a part of the outputs is used: all others would keep their channels."""

    def __init__(self, model: nn.Module, counts: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.counts = model, counts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What counts of the outputs."""
        return self.counts(self.model(*args, **kwargs))


def named(*names: str) -> Callable[[Any], Any]:
    """Takes outputs by their names."""
    return lambda out: tuple(out[name] for name in names)


def tensor(*shape: int) -> Callable[[int], Tensor]:
    """Draws a batch of normal tensors."""
    return lambda batch: torch.randn(batch, *shape)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on inputs: a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Inputs with all floating-point tensors in another precision."""

    def convert(leaf: Tensor) -> Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return tree_map_only(Tensor, convert, inputs)


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of an output, whatever holds them."""
    if not isinstance(outputs, Tensor | tuple | list | dict):
        outputs = vars(outputs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


@torch.no_grad()
def unsettle(model: nn.Module, inputs: Any, trains: bool = True) -> None:
    """Random affine parameters; running statistics near those of real activations.

    Statistics drawn without looking at activations let these explode or vanish with depth, and
    a network whose output does not depend on its input verifies nothing. Neither does a bias, a
    table of positions or a scale of layers that starts as zeros.
    """
    for parameter in model.parameters():
        _unsettle(parameter)
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.train(trains)
    for norm in norms:
        norm.train().momentum = 1.0
    call(model, inputs)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        var.mul_(torch.empty_like(var).uniform_(0.75, 1.25)).add_(0.05 * var.mean())
        mean.add_(var.sqrt() * torch.empty_like(mean).uniform_(-0.25, 0.25))


def _unsettle(parameter: Tensor) -> None:
    """Make a constant parameter vary, and a tiny one count; its size is as usual for its shape."""
    if not parameter.numel() or not parameter.is_floating_point():
        return
    first = parameter.flatten()[0]
    if not bool((parameter == first).all()):
        usual = 1 / math.sqrt(math.prod(parameter.shape[1:]))
        if parameter.dim() > 1 and float(parameter.std()) < 0.3 * usual:
            parameter.mul_(usual / parameter.std())
        return
    if abs(float(first)) > 0.01:
        parameter.mul_(torch.empty_like(parameter).uniform_(0.75, 1.25))
    else:  # a layer scale of 1e-6 as well: its block would hardly count
        fan_in = math.prod(parameter.shape[1:])
        parameter.copy_(torch.empty_like(parameter).uniform_(0.1, 0.5) / math.sqrt(fan_in))
        parameter.mul_(torch.randn_like(parameter).sign())


def cases(suite: str, patterns: Iterable[str] = ("*",)) -> list[Case]:
    """The models of a suite whose names match one of the patterns."""
    patterns = list(patterns)
    module = importlib.import_module("recurrent" if suite == "recurrent" else f"suites_{suite}")
    return [
        case
        for case in module.suite()
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
