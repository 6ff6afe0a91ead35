"""Sizes that torch's own layers remember about their parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from graphprune.record.attention import MultiheadAttention
from graphprune.record.sizes import Attribute, Comparison, Extent, Size
from graphprune.record.tensors import named_modules

Refresh = Callable[[Any], dict[str, Any]]


def _shape(layer: Any, ndim: int = 2) -> tuple[int, ...]:
    """That of a weight, which hooks may compute from another parameter.

    Empty for a weight with other dimensions than torch's: one for each of several experts, say.
    """
    names = ("weight", "weight_v", "weight_orig")
    name = next((name for name in names if name in layer._parameters), "weight")
    shape = tuple(getattr(layer, name).shape)
    return shape if len(shape) == ndim else ()


def _convolution(layer: Any) -> dict[str, object]:
    shape = _shape(layer, 2 + len(layer.kernel_size))
    if not shape:
        return {}
    near, far = shape[0], shape[1] * layer.groups
    out, into = (far, near) if layer.transposed else (near, far)
    return {"in_channels": into, "out_channels": out}


def _norm(layer: Any) -> dict[str, object]:
    vector = layer.weight if layer.weight is not None else layer.running_mean
    return {} if vector is None else {"num_features": vector.shape[0]}


def _affine(name: str) -> Refresh:
    def refresh(layer: Any) -> dict[str, object]:
        if layer.weight is None:
            return {}
        shape = layer.weight.shape
        return {name: tuple(shape) if name == "normalized_shape" else shape[0]}

    return refresh


def _attention(layer: Any) -> dict[str, object]:
    packed = layer.in_proj_weight
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    inputs = [w.shape[1] for w in ((packed,) * 3 if packed is not None else weights)]
    return dict(zip(("embed_dim", "kdim", "vdim"), inputs))


def _encoder(stack: Any) -> dict[str, object]:
    attentions = [getattr(layer, "self_attn", None) for layer in stack.layers]
    changed = any(isinstance(attention, MultiheadAttention) for attention in attentions)
    return {"use_nested_tensor": False} if changed else {}  # as torch sets it for such layers


TABLE: tuple[tuple[type | tuple[type, ...], Refresh], ...] = (
    (_ConvNd, _convolution),
    (nn.Linear, lambda m: dict(zip(("out_features", "in_features"), _shape(m)))),
    (
        nn.Bilinear,
        lambda m: dict(zip(("out_features", "in1_features", "in2_features"), _shape(m, 3))),
    ),
    (_NormBase, _norm),
    (nn.GroupNorm, _affine("num_channels")),
    ((nn.LayerNorm, nn.RMSNorm), _affine("normalized_shape")),
    (nn.MultiheadAttention, _attention),
    (nn.TransformerEncoder, _encoder),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.numel()}),
    (
        (nn.Embedding, nn.EmbeddingBag),
        lambda m: dict(zip(("num_embeddings", "embedding_dim"), _shape(m))),
    ),
)


def refresh(module: nn.Module) -> None:
    """Bring the remembered sizes of one of torch's own layers in line with its parameters."""
    sizes = next((found for kinds, found in TABLE if isinstance(module, kinds)), None)
    if sizes is None:
        return
    with _readable(module):
        for name, value in sizes(module).items():
            if getattr(module, name) != value:
                setattr(module, name, value)


@contextlib.contextmanager
def _readable(module: nn.Module) -> Iterator[None]:
    """Its weights can be read without changing it: in train mode that updates spectral norms."""
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is None:
        yield
        return
    inner = list(parametrizations.modules())
    modes = [(part, part.training) for part in (module, *inner)]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def remembered(
    model: nn.Module, owners: set[str], nodes: Mapping[str, fx.Node]
) -> Iterator[Comparison]:
    """What :func:`refresh` will make true of the attributes of some layers.

    Args:
        model: the model.
        owners: names of modules.
        nodes: the recorded nodes of parameters, by name.
    """
    for name, module in named_modules(model):
        kinds = (sizes for kinds, sizes in TABLE if isinstance(module, kinds))
        sizes = next(kinds, None) if name in owners else None
        with _readable(module):
            known_sizes = sizes(_Marked(name, module, nodes)) if sizes else {}
        for key, value in known_sizes.items():
            items = value if isinstance(value, tuple) else (value,)
            for place, item in enumerate(items):
                path = (place,) if isinstance(value, tuple) else ()
                if isinstance(item, Size):
                    known = Attribute(name, key, path, int(item))
                    yield Comparison("eq", known, item.expression, True)


class _Marked:
    """A layer whose sizes know which dimension of which parameter they are."""

    def __init__(self, name: str, module: nn.Module, nodes: Mapping[str, fx.Node]) -> None:
        self.name, self.module, self.nodes = name, module, nodes

    def __getattr__(self, key: str) -> object:
        value = getattr(self.module, key)
        node = self.nodes.get(f"{self.name}.{key}" if self.name else key)
        if node is not None:
            shape = tuple(Size(n, Extent(node, dim)) for dim, n in enumerate(value.shape))
            return SimpleNamespace(shape=shape, numel=lambda: shape[0])
        return Size(value, Attribute(self.name, key, (), value)) if type(value) is int else value
