"""Fused recurrent layers and packed sequences."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphprune.ops.ids import Layers, along, varying
from graphprune.ops.rules.base import Walk, aten
from graphprune.ops.rules.contraction import contract
from graphprune.ops.rules.registry import Value, register_rule

_LSTM = 2  # the number of the mode


@register_rule(aten._pack_padded_sequence)
def pack(walk: Walk, node: fx.Node, x: Value, *args: Any) -> list[Layers]:
    """Steps of all sequences, one after the other."""
    kept = walk.settle(x, (0, 1), "steps of sequences")
    return [tuple(layer.squeeze(0) for layer in kept), ()]


@register_rule(aten._pad_packed_sequence)
def pad_packed(walk: Walk, node: fx.Node, x: Value, *args: Any) -> list[Layers]:
    """Packed steps as sequences of equal length."""
    kept = walk.settle(x, (0,), "steps of sequences")
    return [tuple(layer.unsqueeze(0) for layer in kept), ()]


def _first_dim(value: Value) -> Value:
    """The gates of a weight or bias."""
    rows = tuple(i.reshape(-1) for i in value.on(0) if varying(i) == {0})
    return Value(value.shape[:1], rows)


@register_rule(aten.mkldnn_rnn_layer)
def mkldnn_rnn_layer(
    walk: Walk, node: fx.Node, x: Value, w_in: Value, w_state: Value, b_in: Value, b_state: Value,
    state: Value, cell: Value, reverse: bool, sizes: Any, mode: int, *args: Any,
) -> list[Layers]:  # fmt: skip
    """One layer of an LSTM: the four gates lose the same channels as the states."""
    everything = [x, w_in, w_state, b_in, b_state, state, cell]
    rows = w_in.on(0)
    if mode != _LSTM or len(rows) != 1:
        return list(walk.refuse(everything))
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
