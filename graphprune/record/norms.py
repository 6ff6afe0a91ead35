"""LayerNorm, GroupNorm and softmax that count channels which left as zeroes.

A smaller norm of torch takes its statistics over the channels that it is given. These have the same
parameters and take them over as many as the original had, as the masked model does. Which calls in
code can be told to do so is found out here as well.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import types
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.ops.exact_norms import group_norm, layer_norm
from graphprune.ops.exact_shares import log_softmax, softmax
from graphprune.record.sites import (
    Site,
    counting_call,
    defined,
    follow,
    forward_of,
    spans_of,
    start,
)


class ExactLayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al., 2016) over ``of`` numbers, of which those that are not given are zero.

    Parameters, their names, arguments and results are those of ``nn.LayerNorm``; ``of`` is an
    attribute. ``graphprune.rebuild(..., exact_only=True)`` makes them.

    Example:
        >>> import torch
        >>> from graphprune.record.norms import count_as_zero
        >>> whole, small = torch.nn.LayerNorm(5), torch.nn.LayerNorm(3)
        >>> count_as_zero(small, 5)
        >>> type(small).__name__, small.normalized_shape, small.of
        ('ExactLayerNorm', (3,), 5)
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]])
        >>> torch.allclose(small(x[:, :3]), whole(x)[:, :3])
        True
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.LayerNorm.forward``."""
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        return layer_norm(input, shape, weight, bias, self.eps, of=self.of)

    def extra_repr(self) -> str:
        """The arguments, and of how many numbers."""
        return f"{super().extra_repr()}, of={self.of}"


class ExactGroupNorm(nn.GroupNorm):
    """GroupNorm (Wu and He, 2018) of groups of ``of`` channels; those that are not given are zero.

    Parameters, their names, arguments and results are those of ``nn.GroupNorm``; ``of`` is an
    attribute. ``graphprune.rebuild(..., exact_only=True)`` makes them.

    Example:
        >>> import torch
        >>> from graphprune.record.norms import count_as_zero
        >>> whole, small = torch.nn.GroupNorm(1, 5), torch.nn.GroupNorm(1, 3)
        >>> count_as_zero(small, 5)
        >>> x = torch.randn(2, 5, 4)
        >>> x[:, 3:] = 0
        >>> torch.allclose(small(x[:, :3]), whole(x)[:, :3], atol=1e-6)
        True
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.GroupNorm.forward``."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, of=self.of)

    def extra_repr(self) -> str:
        """The arguments, and of how many channels the groups are."""
        return f"{super().extra_repr()}, of={self.of}"


def counts_in_code(module: nn.Module, site: Site) -> bool:
    """Whether an expression in the code of a module calls statistics that can count what left.

    That is a function of torch, a method of a tensor, or the forward that a derived class inherits.
    """
    function: Any = forward_of(module)
    for step in site.steps:
        function = follow(function, step, module)
    code = getattr(function, "__code__", None)
    definition = defined(code) if isinstance(code, types.CodeType) else None
    if definition is None:
        return False
    place = replace(site, first=start(function.__code__)).absolute
    calls = (node for node in ast.walk(definition) if isinstance(node, ast.Call))
    call = next((node for node in calls if place in spans_of(node)), None)
    name = "" if call is None else counting_call(call)
    if call is None or not name:
        return False
    if name == "forward":
        return not site.steps and _inherited(type(module), function) in _FORWARDS
    if name in _PLACES and not _plain(call, name, site.method):
        return False
    return (name in _PLACES and site.method) or _global(call, function) in _FUNCTIONS[name]


def _plain(call: ast.Call, name: str, method: bool) -> bool:
    """Whether a call gives no more than a tensor, a dimension and whether that is kept."""
    named = {keyword.arg for keyword in call.keywords} <= {"input", "dim", "keepdim"}
    return named and len(call.args) + method <= _PLACES[name]


def _global(call: ast.Call, function: Any) -> Any:
    """What a call is of, if a chain of attributes of a global name says so."""
    names, node = [], call.func
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id in function.__code__.co_varnames:
        return None
    found = function.__globals__.get(node.id)
    for name in reversed(names):
        found = inspect.getattr_static(found, name, None)
    return found


def _inherited(kind: type, function: object) -> object:
    """What ``super().forward`` is in the forward of a class."""
    forwards = [vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)]
    place = forwards.index(function) if function in forwards else len(forwards)
    return next(iter(forwards[place + 1 :]), None)


def exact_forward(module: Any, input: Tensor, *, of: int) -> Tensor:
    """What takes the place of ``super().forward(input)`` in the code of a derived class."""
    affine = module.weight, module.bias, module.eps
    if isinstance(module, nn.GroupNorm):
        return group_norm(input, module.num_groups, *affine, of=of)
    return layer_norm(input, module.normalized_shape, *affine, of=of)


class ExactSoftmax(nn.Softmax):
    """Softmax over ``of`` numbers, of which those that are not given are zero.

    Example:
        >>> import torch
        >>> from graphprune.record.norms import count_as_zero
        >>> small, x = torch.nn.Softmax(0), torch.tensor([1.0, 2.0, 0.0, 0.0])
        >>> count_as_zero(small, 4)
        >>> torch.allclose(small(x[:2]), x.softmax(0)[:2])
        True
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Softmax.forward``."""
        assert self.dim is not None
        return softmax(input, self.dim, of=self.of)

    def extra_repr(self) -> str:
        """The dimension, and of how many numbers."""
        return f"{super().extra_repr()}, of={self.of}"


class ExactLogSoftmax(nn.LogSoftmax):
    """The logarithm of :class:`ExactSoftmax`."""

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.LogSoftmax.forward``."""
        assert self.dim is not None
        return log_softmax(input, self.dim, of=self.of)

    def extra_repr(self) -> str:
        """The dimension, and of how many numbers."""
        return f"{super().extra_repr()}, of={self.of}"


_FUNCTIONS: dict[str, tuple[object, ...]] = {
    "layer_norm": (functional.layer_norm,),
    "group_norm": (functional.group_norm,),
    "softmax": (functional.softmax, torch.softmax),
    "log_softmax": (functional.log_softmax, torch.log_softmax),
    "mean": (torch.mean,),
}
_PLACES = {"softmax": 2, "log_softmax": 2, "mean": 3}  # of the arguments by place that are known
_FORWARDS = (nn.LayerNorm.forward, nn.GroupNorm.forward)
EXACT: dict[type, type] = {
    nn.LayerNorm: ExactLayerNorm,
    nn.GroupNorm: ExactGroupNorm,
    nn.Softmax: ExactSoftmax,
    nn.LogSoftmax: ExactLogSoftmax,
}


def counted(module: nn.Module) -> int:
    """How many numbers, or channels of a group, a norm of torch takes its statistics over.

    0 for all other modules, among them norms whose forward is not torch's own; any number for a
    softmax, which does not know.
    """
    if type(module) not in EXACT or "forward" in vars(module):
        return 0
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        return 0 if module.dim is None else sys.maxsize
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    assert isinstance(module, nn.LayerNorm)
    return math.prod(module.normalized_shape)


def count_as_zero(module: nn.Module, of: int) -> None:
    """Make a norm or softmax of torch one that counts what left as zeroes, in place.

    Args:
        module: of a class that is a key of ``EXACT``, no class derived from it.
        of: how many numbers, or channels of a group, it counts.
    """
    module.__class__ = EXACT[type(module)]
    vars(module)["of"] = of
