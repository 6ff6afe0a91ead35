"""Multi-head attention of torch with an inner size of its own, as a layer and as a function.

Torch computes the size of a head as ``embed_dim // num_heads``, which does not hold when
heads are removed or the stream that they read is cut. While a model is recorded, and in small
models where something of it was cut, a layer of torch is run by the class of this file, and a call
of ``torch.nn.functional.multi_head_attention_forward`` by its function of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.record import scope
from graphprune.record.masked_names import mask_hooks
from graphprune.record.sites import INNER_SIZES
from graphprune.record.sizes import told_apart

_SIZES = ("head_dim", "value_dim", "scale")  # what layers of this file know besides


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads need not add up to the embedding.

    Parameters, arguments and results of ``forward`` are those of ``nn.MultiheadAttention``
    (Vaswani et al., "Attention Is All You Need", 2017): ``num_heads`` heads
    of ``head_dim`` for queries and keys each, and of ``value_dim`` for values.

    Example:
        >>> import torch
        >>> from graphprune.record.attention import MultiheadAttention, replace_attention
        >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.randn(1, 3, 8)
        >>> wanted = layer(x, x, x)[0]
        >>> replace_attention(layer)
        >>> isinstance(layer, MultiheadAttention), torch.allclose(layer(x, x, x)[0], wanted)
        (True, True)
    """

    value_dim: int
    scale: float

    @property
    def _qkv_same_embed_dim(self) -> bool:  # an attribute in torch
        """Tells torch's transformer layers to leave their fused path, which assumes equal sizes."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``; ``is_causal`` is a hint and needs ``attn_mask``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        inputs = _batch_first((query, key, value), self.batch_first)
        out, weights = _attend(
            _projections(self, inputs, query is key and key is value),
            _mask(attn_mask, key_padding_mask, inputs[0], self.num_heads),
            self,
            self.dropout if self.training else 0.0,
            need_weights,
        )
        if scope.current() is not None:
            self._mask_output()
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        return _as_given(out, weights, query, self.batch_first, average_attn_weights)

    def _mask_output(self) -> None:
        """Let a record show where a masked weight comes from: torch runs no hook of this layer."""
        for hook in mask_hooks(self.out_proj):
            hook(self.out_proj, ())


def _batch_first(inputs: Sequence[Tensor], are: bool) -> list[Tensor]:
    """Queries, keys and values as ``[batch, length, width]``."""
    if inputs[0].dim() == 2:
        return [x.unsqueeze(0) for x in inputs]
    return [x if are else x.transpose(0, 1) for x in inputs]


def _projections(layer: Any, inputs: Sequence[Tensor], same: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[batch, length, heads * width]``."""
    keys, values = layer.num_heads * layer.head_dim, layer.num_heads * layer.value_dim
    sizes = [keys, keys, values]
    bias = layer.in_proj_bias
    if same and layer.in_proj_weight is not None:
        return torch.split(F.linear(inputs[0], layer.in_proj_weight, bias), sizes, -1)
    weights: Any = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    if layer.in_proj_weight is not None:
        weights = torch.split(layer.in_proj_weight, sizes)
    biases = [None] * 3 if bias is None else torch.split(bias, sizes)
    return tuple(map(F.linear, inputs, weights, biases))


def _mask(mask: Tensor | None, padding: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """What is added to the scores, broadcast to ``[batch, heads, length, length]``."""
    masks = []
    if mask is not None:
        mask = _additive(mask, q.dtype)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[0], heads))
        masks.append(mask)
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        masks.append(_additive(padding, q.dtype)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _attend(
    projected: Sequence[Tensor],
    mask: Tensor | None,
    layer: Any,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the heads read, ``[batch, length, heads * width]``, and the weights if needed."""
    q, k, v = projected
    length = k.shape[1]
    if layer.bias_k is not None and layer.bias_v is not None:
        k = torch.cat([k, layer.bias_k.expand(k.shape[0], -1, -1)], 1)
        v = torch.cat([v, layer.bias_v.expand(v.shape[0], -1, -1)], 1)
    q = q.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
    k = k.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
    v = v.unflatten(-1, (layer.num_heads, layer.value_dim)).transpose(1, 2)
    if layer.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    added = k.shape[2] - length
    if mask is not None and added:
        mask = F.pad(mask, (0, added))
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=layer.scale)
        return out.transpose(1, 2).flatten(2), None
    scores = (q * layer.scale) @ k.transpose(2, 3)
    weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _as_given(
    out: Tensor, weights: Tensor | None, query: Tensor, batch_first: bool, average: bool
) -> tuple[Tensor, Tensor | None]:
    """Results in the layout of the query."""
    batched = query.dim() == 3
    if weights is not None:
        weights = weights.mean(1) if average else weights
        weights = weights if batched else weights.squeeze(0)
    if not batched:
        out = out.squeeze(0)
    return out if batch_first or not batched else out.transpose(0, 1), weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true: not allowed) as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def replace_attention(module: nn.Module) -> None:
    """Make a layer of torch one of this file, in place; other modules stay as they are.

    A layer of a class that inherits from torch's gets a class that inherits from both, so that what
    its own forward calls by ``super()`` is the forward of this file.
    """
    if is_attention(module):
        layer: Any = module
        head = layer.embed_dim // layer.num_heads
        layer.__class__ = _both(type(layer))
        vars(layer).update(head_dim=head, value_dim=head, scale=float(head) ** -0.5)


def is_attention(module: nn.Module) -> bool:
    """Whether a layer is one of torch that may become one of this file."""
    kind = type(module)
    if kind is nn.MultiheadAttention:
        return True
    if not isinstance(module, nn.MultiheadAttention) or isinstance(module, MultiheadAttention):
        return False
    own = kind.__mro__[: kind.__mro__.index(nn.MultiheadAttention)]
    held = [vars(each) for each in own]
    read = {*_SIZES, *nn.MultiheadAttention.forward.__code__.co_names} - {"forward"}
    if any(read & each.keys() for each in held) or "forward" in vars(module):
        return False
    forwards = [each["forward"] for each in held if "forward" in each]
    return all(_calls_super(function) for function in forwards)


def _calls_super(function: Any) -> bool:
    """Whether a forward leaves attention itself to the class that it inherits from."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return False
    inherits = "__class__" in code.co_freevars and "forward" in code.co_names
    return inherits and not {"_qkv_same_embed_dim", *_SIZES}.intersection(code.co_names)


def _both(kind: type) -> type:
    """A class that is one of a user's and the one of this file; copied and saved by the former."""
    bases = (kind, MultiheadAttention)
    if kind is nn.MultiheadAttention:
        return MultiheadAttention

    def reduced(layer: Any, protocol: Any) -> Any:
        return (_empty, (kind,), *object.__reduce_ex__(layer, protocol)[2:])

    named = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    known: list[type] = kind.__subclasses__()
    made = next((each for each in known if each.__bases__ == bases), None)
    return made or type(kind)(kind.__name__, bases, {**named, "__reduce_ex__": reduced})


def _empty(kind: type) -> Any:
    """A layer of both classes without anything in it."""
    return object.__new__(_both(kind))


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
INNER = (*INNER_SIZES, "scale")  # what the function of this file takes besides


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """As the function of torch, for heads that need not add up to the embedding.

    Args:
        args: as that of torch.
        kwargs: as that of torch; besides ``head_dim`` and ``value_dim``, the width of a head of
            queries and keys, and of values, and ``scale``, what the products are multiplied with.
            Absent they are those of torch.
    """
    inner = {name: kwargs.pop(name, None) for name in INNER}
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    head = abs(given.embed_dim_to_check // given.num_heads)  # no size to solve either of them for
    defaults = {"head_dim": head, "value_dim": head, "scale": head**-0.5}
    sizes = {name: defaults[name] if size is None else size for name, size in inner.items()}
    sizes |= {name: getattr(given, name) for name in ("num_heads", "embed_dim_to_check")}
    absent = {name for name, size in inner.items() if size is None}
    recorder = scope.current()
    if recorder is None:
        return _functional(SimpleNamespace(**{**vars(given), **sizes}))
    recorder.sizes = sizes = told_apart(sizes, absent)
    try:
        return _functional(SimpleNamespace(**{**vars(given), **sizes}))
    finally:
        recorder.sizes = {}


def _functional(given: Any) -> tuple[Tensor, Tensor | None]:
    """Attention with everything that it needs as attributes of an object."""
    if given.use_separate_proj_weight:
        given.in_proj_weight = None
    [query] = given.query.split(given.embed_dim_to_check, -1)  # all of it, or it raises
    inputs = _batch_first((query, given.key, given.value), False)
    same = given.query is given.key and given.key is given.value
    out, weights = _attend(
        _projections(given, inputs, same),
        _mask(given.attn_mask, given.key_padding_mask, inputs[0], given.num_heads),
        given,
        given.dropout_p if given.training else 0.0,
        given.need_weights,
    )
    out = F.linear(out, given.out_proj_weight, given.out_proj_bias)
    return _as_given(out, weights, given.query, False, given.average_attn_weights)
