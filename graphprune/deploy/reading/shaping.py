"""Operators that move data: shapes, slices, joins, images of another size."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from graphprune.deploy.reading import functions
from graphprune.deploy.reading.builder import Builder
from graphprune.deploy.reading.document import Node
from graphprune.deploy.reading.elementwise import Converter

_MODES = {
    "nearest": dict.fromkeys((3, 4, 5), "nearest"),
    "linear": {3: "linear", 4: "bilinear", 5: "trilinear"},
    "cubic": {4: "bicubic"},
}


def axis_of(b: Builder, node: Node, default: int = 0) -> int:
    """The axis of a node."""
    return int(node.attributes.get("axis", default))


def reshape(b: Builder, node: Node) -> fx.Node:
    """Another shape; 0 keeps a size, unless ``allowzero``."""
    x = b.tensor(node.inputs[0], node)
    known = b.constant(node.inputs[1])
    sizes = b.sizes(node.inputs[1], node, "shape")
    zero = not node.attributes.get("allowzero", 0)
    may = zero and (known is None or bool((known == 0).any()))
    return b.call(functions.reshape if may else torch.reshape, x, sizes)


def flatten(b: Builder, node: Node) -> fx.Node:
    """A matrix."""
    axis = axis_of(b, node, 1)
    axis = axis if axis >= 0 else axis + b.rank(node, node.inputs[0])
    if axis == 1:
        return b.call(torch.flatten, b.tensor(node.inputs[0], node), 1)
    return b.call(functions.flatten, b.tensor(node.inputs[0], node), axis)


def squeeze(b: Builder, node: Node) -> fx.Node:
    """Dimensions of size 1 leave; until opset 12 axes are an attribute."""
    axes = b.known(node, "axes", 1)
    x = b.tensor(node.inputs[0], node)
    return b.call(torch.squeeze, x) if axes is None else b.call(torch.squeeze, x, tuple(axes))


def unsqueeze(b: Builder, node: Node) -> fx.Node:
    """New dimensions of size 1."""
    axes = b.known(node, "axes", 1)
    x = b.tensor(node.inputs[0], node)
    if any(axis < 0 for axis in axes):
        rank = b.rank(node, node.inputs[0]) + len(axes)
        axes = [axis % rank for axis in axes]
    for axis in sorted(axes):
        x = b.call(torch.unsqueeze, x, axis)
    return x


def transpose(b: Builder, node: Node) -> fx.Node:
    """Dimensions in another order."""
    order = node.attributes.get("perm")
    if order is None:
        order = reversed(range(b.rank(node, node.inputs[0])))
    return b.call(torch.permute, b.tensor(node.inputs[0], node), tuple(order))


def concat(b: Builder, node: Node) -> fx.Node:
    """Tensors behind one another."""
    parts = [b.tensor(name, node) for name in node.inputs]
    return parts[0] if len(parts) == 1 else b.call(torch.cat, parts, axis_of(b, node))


def split(b: Builder, node: Node) -> list[fx.Node]:
    """Parts along an axis, of given or of equal sizes."""
    x, axis = b.tensor(node.inputs[0], node), axis_of(b, node)
    count = len(node.outputs)
    if "split" in node.attributes:
        sizes = b.kept_sizes(node, list(node.attributes["split"]))
    elif node.input(1):
        sizes = b.sizes(node.inputs[1], node, "sizes")
    else:
        found = b.call(torch.chunk, x, count, axis)
        return [b.call(operator.getitem, found, place) for place in range(count)]
    found = b.call(torch.split, x, sizes, axis)
    return [b.call(operator.getitem, found, place) for place in range(count)]


def part(b: Builder, node: Node) -> fx.Node:
    """A slice along some axes; until opset 9 bounds are attributes."""
    x = b.tensor(node.inputs[0], node)
    if "starts" in node.attributes:
        starts, ends = (b.kept_sizes(node, list(node.attributes[key]), key)
                        for key in ("starts", "ends"))  # fmt: skip
        count = len(node.attributes["starts"])
    else:
        starts, ends = (b.sizes(node.inputs[place], node, key)
                        for place, key in ((1, "starts"), (2, "ends")))  # fmt: skip
        lengths = (b.document.shapes.get(name, (None,)) for name in node.inputs[1:3])
        count = max(length[0] or 0 for length in lengths)
    axes, steps = b.known(node, "axes", 3), b.known(node, "steps", 4)
    axes = list(range(count)) if axes is None else list(axes)
    steps = [1] * len(axes) if steps is None else list(steps)
    return b.call(functions.part, x, starts, ends, axes, steps)


def expand(b: Builder, node: Node) -> fx.Node:
    """Repeated to a shape."""
    x = b.tensor(node.inputs[0], node)
    return b.call(functions.expand, x, b.sizes(node.inputs[1], node, "shape"))


def tile(b: Builder, node: Node) -> fx.Node:
    """Repeated along every dimension."""
    sizes = b.sizes(node.inputs[1], node, "times")
    return b.method("repeat", b.tensor(node.inputs[0], node), sizes)


def filled(b: Builder, node: Node) -> fx.Node:
    """A tensor of one value."""
    value = node.attributes.get("value")
    if value is None:
        number, kind = 0.0, torch.float32
    else:
        from onnx import numpy_helper

        tensor = torch.from_numpy(numpy_helper.to_array(value).copy())
        number, kind = tensor.reshape(()).item(), tensor.dtype
    sizes = b.sizes(node.inputs[0], node, "shape")
    return b.call(functions.full, sizes, number, kind, b.first)


def pad(b: Builder, node: Node) -> fx.Node:
    """Padding; until opset 10 pads are an attribute."""
    opened = "pads" not in node.attributes and b.constant(node.inputs[1]) is None
    pads: Any = b.sizes(node.inputs[1], node, "pads") if opened else b.known(node, "pads", 1)
    value = b.known(node, "value", 2) or 0.0
    axes = b.known(node, "axes", 3) or list(range(b.rank(node, node.inputs[0])))
    value = value[0] if isinstance(value, list) else value
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = node.attributes.get("mode", b"constant").decode()
    if mode not in modes:
        raise b.refused(node, f"mode {mode!r}")
    x = b.tensor(node.inputs[0], node)
    return b.call(functions.pad, x, pads, modes[mode], float(value), list(axes))


def resize(b: Builder, node: Node) -> fx.Node:
    """``interpolate`` for what it can say; the comparison with the file shows the rest."""
    scales = node.input(1 if node.op == "Upsample" else 2)
    mode = node.attributes.get("mode", b"nearest").decode()
    places = node.attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    rank = b.rank(node, node.inputs[0])
    name = _MODES.get(mode, {}).get(rank)
    corners = places == "align_corners"
    known = ("asymmetric",) if mode == "nearest" else ("half_pixel", "pytorch_half_pixel",
                                                       "align_corners")  # fmt: skip
    if name is None or (node.op == "Resize" and places not in known):
        raise b.refused(node, f"mode {mode!r} with coordinates {places!r} of {rank} dimensions")
    constant = b.constant(scales) if scales else None
    rounding = node.attributes.get("nearest_mode", b"round_prefer_floor").decode()
    doubled = constant is not None and set(constant.tolist()) <= {1, 2}  # halves go down
    if (node.op == "Resize" and mode == "nearest" and rounding != "floor"
            and not (doubled and rounding == "round_prefer_floor")):  # fmt: skip
        raise b.refused(node, f"nearest_mode {rounding!r}: torch takes the place below (floor)")
    options: dict[str, Any] = {"mode": name}
    if mode != "nearest":
        options["align_corners"] = corners
    x = b.tensor(node.inputs[0], node)
    if constant is not None and constant.numel():
        return b.call(F.interpolate, x, scale_factor=constant.tolist()[2:], **options)
    if not node.input(3):
        raise b.refused(node, "it has neither constant scales nor sizes")
    sizes = b.sizes(node.inputs[3], node, "sizes")
    sizes = b.call(operator.getitem, sizes, slice(2, None))
    return b.call(F.interpolate, x, sizes, **options)


def depth_to_space(b: Builder, node: Node) -> fx.Node:
    """Channels to places of an image."""
    columns = node.attributes.get("mode", b"DCR").decode() == "CRD"
    x, block = b.tensor(node.inputs[0], node), int(node.attributes["blocksize"])
    return b.call(functions.blocks_to_space, x, block, columns)


def einsum(b: Builder, node: Node) -> fx.Node:
    """A product of sums."""
    equation = node.attributes["equation"].decode()
    return b.call(torch.einsum, equation, *(b.tensor(name, node) for name in node.inputs))


def gather_nd(b: Builder, node: Node) -> fx.Node:
    """Elements or slices by tuples of indices."""
    if node.attributes.get("batch_dims", 0):
        raise b.refused(node, "batch_dims")
    return b.call(functions.gather_nd, *(b.tensor(name, node) for name in node.inputs))


def scatter_nd(b: Builder, node: Node) -> fx.Node:
    """Other elements or slices at tuples of indices."""
    if node.attributes.get("reduction", b"none") != b"none":
        raise b.refused(node, "its reduction")
    return b.call(functions.scatter_nd, *(b.tensor(name, node) for name in node.inputs))


def gather_elements(b: Builder, node: Node) -> fx.Node:
    """Elements by an index along an axis."""
    x, index = (b.tensor(name, node) for name in node.inputs)
    return b.call(torch.gather, x, axis_of(b, node), index)


def simple(function: Any, **settings: Any) -> Converter:
    """A function of the first input."""
    return lambda b, node: b.call(function, b.tensor(node.inputs[0], node), **settings)


TABLE: dict[str, Converter] = {
    "Concat": concat, "ConstantOfShape": filled, "DepthToSpace": depth_to_space,
    "Einsum": einsum, "Expand": expand, "Flatten": flatten,
    "GatherElements": gather_elements, "GatherND": gather_nd,
    "GlobalAveragePool": simple(functions.global_mean),
    "GlobalMaxPool": simple(functions.global_max), "Pad": pad, "Reshape": reshape,
    "Resize": resize, "ScatterND": scatter_nd, "Slice": part,
    "SpaceToDepth": lambda b, node: b.call(
        functions.space_to_blocks, b.tensor(node.inputs[0], node),
        int(node.attributes["blocksize"])),
    "Split": split, "Squeeze": squeeze, "Tile": tile, "Transpose": transpose,
    "Unsqueeze": unsqueeze, "Upsample": resize,
}  # fmt: skip
