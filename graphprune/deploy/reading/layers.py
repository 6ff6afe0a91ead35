"""Operators that are layers of torch, with their weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.deploy.reading import functions
from graphprune.deploy.reading.builder import Builder, Value
from graphprune.deploy.reading.document import Node
from graphprune.deploy.reading.elementwise import Converter

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_MAX_POOLS = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_MEAN_POOLS = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def filled(module: nn.Module, **tensors: Tensor | nn.Parameter | None) -> nn.Module:
    """A layer made on meta, with its weights and buffers."""
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) or tensor is None:
            setattr(module, name, tensor)
        else:
            module.register_buffer(name, tensor.clone())
    return module.eval()


def meta(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A layer that draws no weights."""
    made: nn.Module = kind(*args, **kwargs, device="meta")
    return made


def bias_of(b: Builder, node: Node, place: int) -> str:
    """The name of a bias, empty when it is absent.

    Raises:
        ModelError: it is computed from the inputs.
    """
    name = node.input(place)
    if name and not b.is_weight(name, 1):
        raise b.refused(node, f"its bias {name!r} is no constant vector")
    return name


def weight_of(b: Builder, node: Node, place: int, what: str = "weight") -> Tensor:
    """The constant weight of a node.

    Raises:
        ModelError: it is computed from the inputs.
    """
    name = node.input(place)
    if not name or not b.is_weight(name):
        raise b.refused(node, f"its {what} {name!r} is computed from the inputs")
    found = b.constant(name)
    assert found is not None
    return found


# --- windows ----------------------------------------------------------------------------------


def window(b: Builder, node: Node, kernel: Sequence[int], fill: float, x: fx.Node, pad: bool = True
           ) -> tuple[fx.Node, dict[str, Any]]:  # fmt: skip
    """Stride, dilation and symmetric padding; padding of another kind becomes a call of its own."""
    dims = len(kernel)
    stride = tuple(node.attributes.get("strides", [1] * dims))
    dilation = tuple(node.attributes.get("dilations", [1] * dims))
    pads = list(node.attributes.get("pads", [0] * (2 * dims)))
    auto = node.attributes.get("auto_pad", b"NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto == "VALID":
        pads = [0] * (2 * dims)
    elif auto.startswith("SAME"):
        if not pad:
            raise b.refused(node, f"auto_pad {auto} is not supported here")
        upper = auto == "SAME_UPPER"
        given = x, tuple(kernel), stride, dilation, upper, fill
        return b.call(functions.same_pad, *given), {
            "stride": stride, "dilation": dilation, "padding": (0,) * dims,
        }  # fmt: skip
    begin, end = pads[:dims], pads[dims:]
    if begin != end:
        if not pad:
            raise b.refused(node, f"padding {pads}, another at the end, is not supported here")
        flat = list(itertools.chain.from_iterable(zip(reversed(begin), reversed(end))))
        x, begin = b.call(F.pad, x, flat, "constant", fill), [0] * dims
    return x, {"stride": stride, "dilation": dilation, "padding": tuple(begin)}


def convolution(b: Builder, node: Node) -> fx.Node:
    """``nn.Conv*d``."""
    weight, bias = weight_of(b, node, 1), bias_of(b, node, 2)
    if weight.dim() not in _CONVOLUTIONS:
        raise b.refused(node, f"a convolution of {weight.dim() - 2} dimensions")
    x, settings = window(b, node, weight.shape[2:], 0.0, b.tensor(node.inputs[0], node))
    groups = node.attributes.get("group", 1)

    def make() -> nn.Module:
        sizes = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
        made = meta(_CONVOLUTIONS[weight.dim()], *sizes, groups=groups, bias=bool(bias), **settings)
        return filled(made, weight=b.parameter(node.inputs[1]),
                      **({"bias": b.parameter(bias)} if bias else {}))  # fmt: skip

    return b.layer(node, make, x, node.inputs[1], b.values[bias].source if bias else "")


def transposed(b: Builder, node: Node) -> fx.Node:
    """``nn.ConvTranspose*d``."""
    weight, bias = weight_of(b, node, 1), bias_of(b, node, 2)
    if weight.dim() not in _TRANSPOSED or "output_shape" in node.attributes:
        raise b.refused(node, "it has an output_shape, or other than 1 to 3 dimensions")
    dims = weight.dim() - 2
    x, settings = window(b, node, weight.shape[2:], 0.0, b.tensor(node.inputs[0], node), pad=False)
    groups = node.attributes.get("group", 1)
    more = tuple(node.attributes.get("output_padding", [0] * dims))

    def make() -> nn.Module:
        sizes = weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:])
        made = meta(
            _TRANSPOSED[weight.dim()], *sizes, groups=groups, bias=bool(bias),
            output_padding=more, **settings,
        )  # fmt: skip
        return filled(made, weight=b.parameter(node.inputs[1]),
                      **({"bias": b.parameter(bias)} if bias else {}))  # fmt: skip

    return b.layer(node, make, x, node.inputs[1], b.values[bias].source if bias else "")


def max_pool(b: Builder, node: Node) -> fx.Node:
    """Largest values of windows."""
    kernel = node.attributes["kernel_shape"]
    x, settings = window(b, node, kernel, float("-inf"), b.tensor(node.inputs[0], node))
    ceil = bool(node.attributes.get("ceil_mode", 0))
    pool = _MAX_POOLS.get(len(kernel) + 2)
    if pool is None:
        raise b.refused(node, f"a window of {len(kernel)} dimensions")
    return b.call(pool, x, tuple(kernel), **settings, ceil_mode=ceil)


def mean_pool(b: Builder, node: Node) -> fx.Node:
    """Means of windows."""
    kernel, x = node.attributes["kernel_shape"], b.tensor(node.inputs[0], node)
    counted = bool(node.attributes.get("count_include_pad", 0))
    x, settings = window(b, node, kernel, 0.0, x, pad=counted)
    if set(settings.pop("dilation")) != {1} or len(kernel) + 2 not in _MEAN_POOLS:
        raise b.refused(node, "dilated windows, or other than 1 to 3 dimensions")
    ceil = bool(node.attributes.get("ceil_mode", 0))
    return b.call(
        _MEAN_POOLS[len(kernel) + 2], x, tuple(kernel), **settings, ceil_mode=ceil,
        count_include_pad=counted,
    )  # fmt: skip


# --- products ---------------------------------------------------------------------------------


def linear(b: Builder, node: Node, x: fx.Node, weight: str, turn: bool, bias: str) -> fx.Node:
    """``nn.Linear``."""
    tensor = b.constant(weight)
    assert tensor is not None
    rows, columns = tensor.shape if not turn else tensor.shape[::-1]

    def make() -> nn.Module:
        made = meta(nn.Linear, columns, rows, bias=bool(bias))
        return filled(made, weight=b.parameter(weight, turn=turn),
                      **({"bias": b.parameter(bias)} if bias else {}))  # fmt: skip

    return b.layer(node, make, x, weight, (turn, b.values[bias].source if bias else ""))


def gemm(b: Builder, node: Node) -> fx.Node:
    """``nn.Linear`` where it is one, else products."""
    first, second, third = node.inputs[0], node.inputs[1], node.input(2)
    turned = [bool(node.attributes.get(key, 0)) for key in ("transA", "transB")]
    scales = [float(node.attributes.get(key, 1.0)) for key in ("alpha", "beta")]
    simple = not turned[0] and scales[0] == 1.0 and (not third or scales[1] == 1.0)
    if simple and b.is_weight(second, 2) and (not third or _is_bias(b, third, second, turned[1])):
        return linear(b, node, b.tensor(first, node), second, not turned[1], third)
    x, y = (b.tensor(name, node) for name in (first, second))
    x, y = (b.call(torch.t, value) if turn else value for value, turn in zip((x, y), turned))
    found = b.call(functions.scaled, b.call(torch.matmul, x, y), scales[0])
    if not third:
        return found
    return b.call(torch.add, found, b.tensor(third, node), alpha=scales[1])


def matmul(b: Builder, node: Node) -> fx.Node:
    """``nn.Linear`` for a constant matrix, with the bias that is added next; else a product."""
    first, second = node.inputs
    x = b.tensor(first, node)
    if not b.is_weight(second, 2):
        return b.call(torch.matmul, x, b.tensor(second, node))
    reader, bias = b.only_reader(node.outputs[0]), ""
    if reader is not None and reader.op == "Add":
        bias = next(name for name in (*reader.inputs, "") if name != node.outputs[0])
        if not bias or bias not in b.values or not _is_bias(b, bias, second, False):
            bias = ""
    found = linear(b, node, x, second, True, bias)
    if bias and reader is not None:
        b.values[reader.outputs[0]] = Value(node=found)
        b.done.add(reader.outputs[0])
    return found


def _is_bias(b: Builder, name: str, weight: str, turned: bool) -> bool:
    tensor, matrix = b.constant(name), b.constant(weight)
    assert matrix is not None
    return b.is_weight(name, 1) and tensor is not None and len(tensor) == matrix.shape[
        0 if turned else 1]  # fmt: skip


# --- normalisation, tables --------------------------------------------------------------------


def batch_norm(b: Builder, node: Node) -> fx.Node:
    """``nn.BatchNorm*d`` in eval mode."""
    if node.attributes.get("training_mode", 0):
        raise b.refused(node, "it is in training mode: export the model in eval mode")
    rank = b.rank(node, node.inputs[0])
    if rank not in _BATCH_NORMS:
        raise b.refused(node, f"an input of {rank} dimensions")
    weight = weight_of(b, node, 1)
    mean, var = (weight_of(b, node, place, "statistics").clone() for place in (3, 4))
    made = meta(
        _BATCH_NORMS[rank], len(weight), eps=float(node.attributes.get("epsilon", 1e-5)),
        momentum=1 - float(node.attributes.get("momentum", 0.9)),
    )  # fmt: skip

    def make() -> nn.Module:
        return filled(
            made, weight=b.parameter(node.inputs[1]), bias=b.parameter(bias_of(b, node, 2)),
            running_mean=mean, running_var=var, num_batches_tracked=torch.tensor(0),
        )  # fmt: skip

    return b.layer(node, make, b.tensor(node.inputs[0], node), node.inputs[1], node.outputs[0])


def layer_norm(b: Builder, node: Node) -> fx.Node:
    """``nn.LayerNorm`` over the last dimensions, or ``nn.RMSNorm``."""
    weight, bias = weight_of(b, node, 1), node.input(2)
    axis, rank = int(node.attributes.get("axis", -1)), b.rank(node, node.inputs[0])
    if rank - axis % rank != weight.dim() or (bias and not b.is_weight(bias, weight.dim())):
        raise b.refused(node, "its weight or bias does not have the dimensions that it is over")
    root = node.op == "RMSNormalization"
    eps = float(node.attributes.get("epsilon", 1e-5))

    def make() -> nn.Module:
        shape = tuple(weight.shape)
        if root:
            return filled(meta(nn.RMSNorm, shape, eps=eps), weight=b.parameter(node.inputs[1]))
        made = meta(nn.LayerNorm, shape, eps=eps, bias=bool(bias))
        return filled(made, weight=b.parameter(node.inputs[1]),
                      **({"bias": b.parameter(bias)} if bias else {}))  # fmt: skip

    return b.layer(node, make, b.tensor(node.inputs[0], node), node.inputs[1], node.outputs[0])


def group_norm(b: Builder, node: Node) -> fx.Node:
    """``nn.GroupNorm``, from opset 21 on; before that weights were of groups."""
    weight, groups = weight_of(b, node, 1), int(node.attributes["num_groups"])
    if b.opset < 21:
        raise b.refused(node, "until opset 20 its weights are of groups, which torch has not")
    eps = float(node.attributes.get("epsilon", 1e-5))

    def make() -> nn.Module:
        return filled(
            meta(nn.GroupNorm, groups, len(weight), eps=eps),
            weight=b.parameter(node.inputs[1]), bias=b.parameter(bias_of(b, node, 2)),
        )  # fmt: skip

    return b.layer(node, make, b.tensor(node.inputs[0], node), node.inputs[1], node.outputs[0])


def instance_norm(b: Builder, node: Node) -> fx.Node:
    """``nn.InstanceNorm*d``."""
    weight, rank = weight_of(b, node, 1), b.rank(node, node.inputs[0])
    if rank not in _INSTANCE_NORMS:
        raise b.refused(node, f"an input of {rank} dimensions")
    eps = float(node.attributes.get("epsilon", 1e-5))

    def make() -> nn.Module:
        return filled(
            meta(_INSTANCE_NORMS[rank], len(weight), eps=eps, affine=True),
            weight=b.parameter(node.inputs[1]), bias=b.parameter(bias_of(b, node, 2)),
        )  # fmt: skip

    return b.layer(node, make, b.tensor(node.inputs[0], node), node.inputs[1], node.outputs[0])


def gather(b: Builder, node: Node) -> fx.Node:
    """``nn.Embedding`` for rows of a constant matrix, a slice for one place, else an index."""
    table, index = node.inputs
    axis = int(node.attributes.get("axis", 0))
    places, tensor = b.constant(index), b.constant(table)
    if tensor is not None and b.is_weight(table, 2) and axis in (0, -2) and places is None:
        return b.layer(
            node,
            lambda: filled(meta(nn.Embedding, *tensor.shape), weight=b.parameter(table)),
            b.tensor(index, node), table, "",
        )  # fmt: skip
    x = b.tensor(table, node)
    if places is not None and places.dim() == 0:
        return b.call(torch.select, x, axis, int(places))
    if b.values[index].numbers is not None and b.values[index].numbers.ndim == 0:
        return b.call(torch.select, x, axis, b.operand(index, node))
    return b.call(functions.gather, x, b.tensor(index, node), axis % b.rank(node, table))


TABLE: dict[str, Converter] = {
    "AveragePool": mean_pool, "BatchNormalization": batch_norm, "Conv": convolution,
    "ConvTranspose": transposed, "Gather": gather, "Gemm": gemm,
    "GroupNormalization": group_norm, "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm, "MatMul": matmul, "MaxPool": max_pool,
    "RMSNormalization": layer_norm,
}  # fmt: skip
