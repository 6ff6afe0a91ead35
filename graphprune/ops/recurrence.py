"""Fused recurrent layers and packed sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphprune.ops.contraction import contract
from graphprune.ops.ids import Layers, along, varying
from graphprune.ops.registry import declare, free
from graphprune.ops.samples import Length, of
from graphprune.ops.values import Value
from graphprune.ops.walk import Walk

aten = torch.ops.aten
_LSTM = 2  # the number of the mode


@declare(aten._pack_padded_sequence, macs=free, sample=of((2, 3, 4), torch.tensor([3, 2]), True))
def pack(walk: Walk, node: fx.Node, x: Value, *args: object) -> list[Layers]:
    """Steps of all sequences, one after the other."""
    kept = walk.settle(x, (0, 1), "steps of sequences")
    return [tuple(layer.squeeze(0) for layer in kept), ()]


@declare(
    aten._pad_packed_sequence,
    macs=free,
    functions=(torch._VF._pad_packed_sequence,),
    sample=of((5, 4), torch.tensor([2, 2, 1]), True, 0.0, 3),
)
def pad_packed(walk: Walk, node: fx.Node, x: Value, *args: object) -> list[Layers]:
    """Packed steps as sequences of equal length, and their lengths, which a kernel writes."""
    kept = walk.settle(x, (0,), "steps of sequences")
    return [tuple(layer.unsqueeze(0) for layer in kept), ()]


def _first_dim(value: Value) -> Value:
    """The gates of a weight or bias."""
    rows = tuple(i.reshape(-1) for i in value.on(0) if varying(i) == {0})
    return Value(value.shape[:1], rows)


def rnn_macs(out: object, x: Any, w_in: Any, w_state: Any, *args: Any) -> object:
    """Every step multiplies its input and the state with their weights."""
    return math.prod(x[:-1]) * (math.prod(w_in) + math.prod(w_state))


@declare(
    aten.mkldnn_rnn_layer,
    macs=rnn_macs,
    sample=of(
        *((5, 2, 3), (16, 3), (16, 4), (16,), (16,), (2, 4), (2, 4)),
        *(False, [], 2, Length(2, 1), 1, True, False, False, False),
    ).single(),
)
def mkldnn_rnn_layer(
    walk: Walk, node: fx.Node, x: Value, w_in: Value, w_state: Value, b_in: Value, b_state: Value,
    state: Value, cell: Value, reverse: bool, sizes: object, mode: int, *args: object,
) -> list[Layers]:  # fmt: skip
    """One layer of an LSTM: the four gates lose the same channels as the states."""
    everything = [x, w_in, w_state, b_in, b_state, state, cell]
    rows = w_in.on(0)
    if mode != _LSTM or len(rows) != 1:
        return list(walk.refuse(everything))
    x = replace(x, layers=walk.settle(x, (0, 1), "steps of sequences"))
    state, cell = (
        replace(part, layers=walk.settle(part, range(part.ndim - 1), "states of sequences"))
        for part in (state, cell)
    )
    contract(walk, x, w_in, x.ndim - 1, 1)
    contract(walk, state, w_state, state.ndim - 1, 1)
    gates = rows[0].reshape(4, -1)
    hidden = walk.collapse(gates, {0}).reshape(-1)
    walk.broadcast([_first_dim(v) for v in (w_in, w_state, b_in, b_state)], 1)
    for bias in (b_in, b_state):
        for weight in (w_in, w_state):
            if bias.shape == weight.shape:  # zeros in the shape of a weight instead of biases
                walk.broadcast([weight, bias], 2)
    unit = Value((len(hidden),), (hidden,))
    walk.broadcast([unit, state, cell], state.ndim)
    return [
        (along(hidden, len(item.meta["shape"]) - 1, len(item.meta["shape"])),)
        for index, item in sorted(node.meta["items"].items())
        if index < 3
    ]
