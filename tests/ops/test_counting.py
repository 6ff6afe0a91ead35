"""Multiply-accumulates agree with torch's own counter, which counts what its kernels multiply."""

import pytest
import torch
from support.zoo import ZOO
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphprune.ops.registry import packet_of
from graphprune.record.cost import left_out, macs
from graphprune.record.inputs import Call
from graphprune.record.recording import record

aten = torch.ops.aten
# Ops that torch's counter does not know, or counts as one way to compute them.
APART = {aten._trilinear, aten.einsum, aten.mv, aten.dot, aten.vdot, aten.addmv, aten._grouped_mm}


def counts(entry):
    """Ours, and torch's with every kernel taken apart into products of matrices."""
    model, inputs = entry.build(), entry.inputs()
    call = Call.of(inputs)
    rec = record(model, call, training=False)
    args, kwargs = call.args, call.kwargs
    with (
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(*args, **kwargs)  # with gradients: torch's layers take no fast path then
    return rec, macs(rec), counter.get_total_flops() // 2


def assert_agree(name):
    rec, own, theirs = counts(ZOO[name])
    if not any(packet_of(node) in APART for node in rec.ops):
        assert own == theirs
    assert not [op for op in left_out(rec) if "mm" in op or "conv" in op]


SOME = ["lstm", "attention_fused_by_torch", "multihead_attention_layer", "encoder_layer", "Llama"]


@pytest.mark.parametrize("name", SOME)
def test_some_networks(name):
    assert_agree(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO))
def test_all_networks(name):
    if name in ("LearnedQueries", "SlotAttention"):
        pytest.skip("torch's counter does not run on it with gradients")
    assert_agree(name)
