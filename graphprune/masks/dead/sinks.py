"""Where a constant that is added to the outputs of a layer can be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from graphprune.masks.dead.affine import parts_of
from graphprune.masks.interpret import Interpreter
from graphprune.ops.batch_norm import Norm
from graphprune.ops.calls import args_of
from graphprune.ops.views import norm_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Sink:
    """A vector that takes a constant: a bias, a running mean, or a bias that is yet to be made.

    ``mask`` is the buffer that the vector is multiplied with, if there is one. ``like`` is set for
    a new bias: the weight and its dimension that lie along the outputs.
    """

    tensor: str
    sign: int = 1
    mask: str | None = None
    like: tuple[str, int] | None = None


def sink_of(node: fx.Node, model: nn.Module, inside: Interpreter) -> Sink | None:
    """Where a constant added to the outputs of a convolution or linear layer goes.

    The bias; else the running mean of the BatchNorm that alone reads the outputs; else a new bias,
    where a layer of torch computes them.
    """
    parts = parts_of(node)
    assert parts is not None
    _, weight, bias, _, how = parts
    if bias is not None:
        return _bias(bias)
    norm = norm_behind(node)
    if norm is not None and not norm.training:
        mean = norm.mean
        if _stored(mean) and len(mean.users) == 1:
            return Sink(str(mean.target), -1)
    return _new_bias(node, weight, how, model)


@dataclass(frozen=True)
class Matrix:
    """A stored weight, the mask that it is multiplied with, and its dimension of the inputs."""

    tensor: str
    mask: str | None
    dim: int


def stored_matrix(node: fx.Node) -> Matrix | None:
    """The weight of a convolution or linear layer, if it is a parameter read by such ops alone."""
    parts = parts_of(node)
    assert parts is not None
    _, weight, _, turned, how = parts
    dim = int(not (turned or (how and how[3])))
    grouped = how is not None and how[5] != 1
    if grouped or not all(_is_weight(user, weight) for user in weight.users):
        return None
    if _stored(weight):
        return Matrix(str(weight.target), None, dim)
    names = _masked(weight)
    return None if names is None else Matrix(*names, dim)


def _masked(product: fx.Node) -> tuple[str, str] | None:
    """A vector or matrix that hooks of ``torch.nn.utils.prune`` multiply with its mask."""
    args = args_of(product)
    if getattr(product.target, "overloadpacket", None) is not aten.mul or len(args) != 2:
        return None
    if not all(_stored(arg) and len(arg.users) == 1 for arg in args):
        return None
    first, second = (str(arg.target) for arg in args)
    for tensor, mask in ((first, second), (second, first)):
        if tensor.endswith("_orig") and mask == tensor.removesuffix("_orig") + "_mask":
            return tensor, mask
    return None


def _is_weight(user: fx.Node, weight: fx.Node) -> bool:
    parts = parts_of(user)
    return parts is not None and parts[1] is weight and weight not in (parts[0], parts[2])


def norm_behind(node: fx.Node) -> Norm | None:
    """The BatchNorm that alone reads a value."""
    norm = norm_of(next(iter(node.users))) if len(node.users) == 1 else None
    return norm if norm is not None and norm.x is node else None


def needed(node: fx.Node, outputs: int, inside: Interpreter) -> Tensor:
    """Outputs that are read by anything but the weight zero of a BatchNorm."""
    everything = torch.ones(outputs, dtype=torch.bool)
    norm = norm_behind(node)
    scale = None if norm is None else inside.fixed(norm.weight)
    return everything if scale is None else scale.nonzero & everything


def _stored(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _bias(bias: fx.Node) -> Sink | None:
    """A parameter, or a parameter times a mask, that is used as a bias and for nothing else."""
    if not all(_is_bias(user, bias) for user in bias.users):
        return None
    if len({parts[1] for user in bias.users if (parts := parts_of(user))}) > 1:
        return None  # several weights would have to agree
    if _stored(bias):
        return Sink(str(bias.target))
    names = _masked(bias)
    return None if names is None else Sink(names[0], mask=names[1])


def _is_bias(user: fx.Node, bias: fx.Node) -> bool:
    parts = parts_of(user)
    return parts is not None and parts[2] is bias and bias not in parts[:2] and not user.kwargs


def _new_bias(
    node: fx.Node, weight: fx.Node, how: tuple[object, ...] | None, model: nn.Module
) -> Sink | None:
    """A bias for a layer of torch that has none."""
    name = str(node.meta.get("module", ""))
    layer = model.get_submodule(name)
    plain = type(layer).forward in _FORWARDS and getattr(layer, "bias", 0) is None
    if not plain or "bias" not in layer._parameters:
        return None
    transposed = bool(how and how[3])
    if transposed and how is not None and how[5] != 1:
        return None
    prefix = f"{name}." if name else ""
    stored = [weight, *weight.all_input_nodes]
    for source in stored:
        owner, _, own = str(source.target).rpartition(".")
        if _stored(source) and owner == name and own in ("weight", "weight_orig"):
            return Sink(f"{prefix}bias", like=(str(source.target), int(transposed)))
    return None


_FORWARDS = {nn.Linear.forward, *(kind.forward for kind in _ConvNd.__subclasses__())}
