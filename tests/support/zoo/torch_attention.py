"""The attention and transformer layers of torch."""

import torch
from torch import nn

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
