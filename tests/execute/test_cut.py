"""Slices are copied bit by bit, whatever the numbers are and however they lie in memory."""

import pytest
import torch

from graphprune.execute.shrink import CHUNK, cut

KEPT = {0: torch.tensor([1, 4, 5]), 1: torch.tensor([0, 2, 6, 7])}
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64,
    torch.uint8, torch.complex64, torch.complex128,
)  # fmt: skip


def drawn(dtype):
    values = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * 5
    return values.to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    "kept", [{0: KEPT[0]}, {1: KEPT[1]}, KEPT], ids=["rows", "columns", "both"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_are_those_of_the_tensor(dtype, kept):
    tensor = drawn(dtype)
    rows, columns = kept.get(0, torch.arange(6)), kept.get(1, torch.arange(8))
    wanted = bits(tensor)[rows][:, columns]
    for layout in (tensor, tensor.contiguous(memory_format=torch.channels_last)):
        small = cut(layout, kept)
        assert small.is_contiguous() or layout is not tensor
        assert torch.equal(bits(small), wanted)


def test_views_that_negate_or_conjugate_are_read_as_such():
    tensor = drawn(torch.float32)
    assert torch.equal(cut(torch._neg_view(tensor), KEPT), -cut(tensor, KEPT))
    tensor = drawn(torch.complex64)
    assert torch.equal(cut(tensor.conj(), {1: KEPT[1]}), cut(tensor, {1: KEPT[1]}).conj())


def test_large_ones_are_cut_in_chunks():
    tensor = torch.arange(3 * CHUNK, dtype=torch.int32).reshape(-1, 1024)
    rows, columns = torch.arange(0, len(tensor), 3), torch.arange(0, 1024, 5)
    assert torch.equal(cut(tensor, {0: rows, 1: columns}), tensor[rows][:, columns])
