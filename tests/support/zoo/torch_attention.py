"""The attention and transformer layers of torch."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import awkward
from support.zoo.streams import HEADS, TOKENS, WIDTH, stream, varied


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` on one stream."""

    def __init__(self, weights=False, **options):
        super().__init__()
        options.setdefault("batch_first", True)
        self.weights, self.attention = weights, nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


@awkward(TOKENS, removable=WIDTH + HEADS)
def multihead_attention_layer():
    return stream(Multihead())


@awkward(TOKENS, removable=WIDTH + HEADS)  # another code path of torch
def multihead_attention_that_computes_weights():
    return stream(Multihead(weights=True))


@awkward(TOKENS, removable=WIDTH + HEADS)
def multihead_attention_sequence_first():
    class First(Multihead):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    return stream(First(batch_first=False))


@awkward(TOKENS, removable=WIDTH + HEADS)
def multihead_attention_without_bias():
    return stream(Multihead(bias=False))


@awkward(TOKENS, removable=WIDTH + HEADS)  # a learned key and value are appended
def multihead_attention_with_bias_tokens():
    return stream(Multihead(add_bias_kv=True))


@awkward(TOKENS, removable=WIDTH + HEADS)
def multihead_attention_with_zero_token():
    return stream(Multihead(add_zero_attn=True))


@awkward(TOKENS, removable=WIDTH + HEADS)
def multihead_attention_causal():
    class Causal(Multihead):
        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    return stream(Causal())


def _padded_tokens():
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return torch.randn(TOKENS), mask


@awkward(_padded_tokens, removable=WIDTH + HEADS)
class MultiheadAttentionWithPadding(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        varied(self)

    def forward(self, x, mask):
        x = self.inp(x)
        y, weights = self.attention(x, x, x, key_padding_mask=mask)
        return self.head(x + y), weights


class MultiheadCross(nn.Module):
    """Cross attention from one input to another; sizes as the options say."""

    def __init__(self, key=WIDTH, value=WIDTH, **options):
        super().__init__()
        self.inp, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.keys, self.values = nn.Linear(5, key), nn.Linear(5, value)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        varied(self)

    def forward(self, x, context):
        x, keys, values = self.inp(x), self.keys(context), self.values(context)
        return self.head(x + self.attention(x, keys, values)[0])


# One weight projects queries, keys and values: they share their input channels.
@awkward(TOKENS, (2, 7, 5), removable=WIDTH + HEADS)
def multihead_cross_attention_of_one_weight():
    return MultiheadCross()


# Three weights: queries, keys and values come from streams of their own.
@awkward(TOKENS, (2, 7, 5), removable=WIDTH + 8 + 10 + HEADS)
def multihead_cross_attention_of_three_weights():
    return MultiheadCross(8, 10, kdim=8, vdim=10)


# Heads, hidden layer, stream.
@awkward(TOKENS, removable=WIDTH + HEADS + 16)
def encoder_layer():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    return varied(nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 4)))


@awkward(TOKENS, removable=WIDTH + HEADS + 16)
def encoder_layer_norm_first():
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 16, activation="gelu", batch_first=False, norm_first=True
    )
    return varied(nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 4)))


@awkward(TOKENS, removable=WIDTH + 2 * (HEADS + 16))
def encoder_of_two_layers():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    return varied(nn.Sequential(nn.Linear(6, WIDTH), encoder, nn.Linear(WIDTH, 4)))


class Decoding(nn.Module):
    """A decoder layer between a target and a memory of its own width."""

    def __init__(self, norm_first):
        super().__init__()
        self.inp, self.memory, self.head = (
            nn.Linear(6, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4))  # fmt: skip
        self.layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 16, batch_first=True, norm_first=norm_first
        )
        varied(self)

    def forward(self, x, memory):
        return self.head(self.layer(self.inp(x), self.memory(memory)))


# Self attention and cross attention have heads of their own; memory and target share a weight.
@awkward(TOKENS, (2, 7, 5), removable=WIDTH + HEADS + HEADS + 16)
def decoder_layer():
    return Decoding(norm_first=False)


@awkward(TOKENS, (2, 7, 5), removable=WIDTH + HEADS + HEADS + 16)
def decoder_layer_norm_first():
    return Decoding(norm_first=True)


@awkward(TOKENS, (2, 7, 5), removable=WIDTH + HEADS + 16 + HEADS + HEADS + 16)
class WholeTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target, self.head = (
            nn.Linear(6, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4))  # fmt: skip
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True)
        varied(self)

    def forward(self, x, y):
        mask = self.transformer.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype)
        return self.head(self.transformer(self.source(x), self.target(y), tgt_mask=mask))


class Functional(nn.Module):
    """Attention that the code calls as a function, with weights of its own for each projection."""

    def __init__(self, weights=True):
        super().__init__()
        self.embed_dim, self.num_heads, self.weights = WIDTH, HEADS, weights
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        x = x.transpose(0, 1)
        _, _, width = x.size()
        assert width == self.embed_dim
        y, _ = F.multi_head_attention_forward(
            x, x, x, self.embed_dim, self.num_heads, torch.empty([0]),
            torch.cat((self.q.bias, self.k.bias, self.v.bias)), None, None, True, 0.1,
            self.o.weight, self.o.bias, self.training, None, self.weights, None,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight)  # fmt: skip
        return y.transpose(0, 1)


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_as_a_function():
    return stream(Functional())


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_as_a_function_without_weights():
    return stream(Functional(weights=False))


@awkward((2, 3, 4, 4), removable=8 + HEADS)
class AttentionPool(nn.Module):
    """A mean of the places asks them all; the output has another width (CLIP)."""

    def __init__(self):
        super().__init__()
        self.inp, self.place = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(17, 8))
        self.q, self.k, self.v, self.o = (nn.Linear(8, out) for out in (8, 8, 8, 5))
        varied(self)

    def forward(self, x):
        x = self.inp(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.place[:, None]
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        return F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=4,
            in_proj_weight=None, in_proj_bias=bias, bias_k=None, bias_v=None,
            add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.o.weight,
            out_proj_bias=self.o.bias, training=self.training, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight)[0].squeeze(0)  # fmt: skip


@awkward(TOKENS, removable=WIDTH + HEADS)
def attention_as_a_function_of_one_weight():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 3)
            self.bias = nn.Parameter(torch.randn(3 * WIDTH))
            self.key, self.value = (nn.Parameter(torch.randn(1, 1, WIDTH)) for _ in range(2))
            self.o = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            x = x.transpose(0, 1)
            return F.multi_head_attention_forward(
                x, x, x, 12, 4, self.weight, self.bias, self.key, self.value, False, 0.0,
                self.o.weight, None, self.training)[0].transpose(0, 1)  # fmt: skip

    return stream(Packed())
