"""``nn.MultiheadAttention`` with an inner size of its own.

Torch's layer computes the size of a head as ``embed_dim // num_heads``, which does not hold when
heads are removed or the stream that it reads is cut. While a model is recorded, and in small
models where something of it was cut, a layer of torch is run by the class of this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from graphprune.record import scope


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
        batched = query.dim() == 3
        q, k, v = self._projections(query, key, value, batched)
        mask = self._mask(attn_mask, key_padding_mask, q)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = k.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_heads, self.value_dim)).transpose(1, 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = k.shape[2] - (key.shape[1 if self.batch_first and batched else 0])
        if mask is not None and added:
            mask = F.pad(mask, (0, added))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.scale) @ k.transpose(2, 3)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        if scope.current() is not None:
            self._mask_output()
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights if batched else weights.squeeze(0)

    def _mask_output(self) -> None:
        """Let a record show where a masked weight comes from: torch runs no hook of this layer."""
        for hook in self.out_proj._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(self.out_proj, ())

    def _projections(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[batch, length, heads * width]``."""
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        sizes = [keys, keys, values]
        inputs = [query, key, value]
        same = query is key and key is value
        if not batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        bias = self.in_proj_bias
        if same and self.in_proj_weight is not None:
            return torch.split(F.linear(inputs[0], self.in_proj_weight, bias), sizes, -1)
        weights: Any = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        if self.in_proj_weight is not None:
            weights = torch.split(self.in_proj_weight, sizes)
        biases = [None] * 3 if bias is None else torch.split(bias, sizes)
        return tuple(map(F.linear, inputs, weights, biases))

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, broadcast to ``[batch, heads, length, length]``."""
        masks = []
        if mask is not None:
            mask = _additive(mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], self.num_heads))
            masks.append(mask)
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            masks.append(_additive(padding, q.dtype)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true: not allowed) as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def replace_attention(module: nn.Module) -> None:
    """Make a layer of torch one of this file, in place; other modules stay as they are."""
    if type(module) is nn.MultiheadAttention:
        head = module.embed_dim // module.num_heads
        module.__class__ = MultiheadAttention
        vars(module).update(head_dim=head, value_dim=head, scale=float(head) ** -0.5)
