"""Comparators that raise, and calls with any kind of example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on inputs as the library takes them."""
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def shapes(out: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors of a nested output."""
    return [tuple(t.shape) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, non-persistent ones included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    """Bitwise equality of all tensors, by name."""
    ours, theirs = state(left), state(right)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor, other), f"{name} differs"


def assert_close(wanted: Tensor, found: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the largest wanted magnitude."""
    assert wanted.shape == found.shape, (wanted.shape, found.shape)
    gap = (wanted - found).abs().max() / wanted.abs().max()
    assert gap <= tolerance, f"relative difference {gap:.1e}"


@contextmanager
def untouched(model: nn.Module):
    """Fails when a model's tensors, modes, attributes or tensor identities change inside."""
    copied = {name: t.detach().clone() for name, t in state(model).items()}
    tensors = {name: id(t) for name, t in state(model).items()}
    modes = [m.training for m in model.modules()]
    keys = [sorted(vars(m)) for m in model.modules()]
    yield
    assert [m.training for m in model.modules()] == modes, "train/eval state changed"
    assert {name: id(t) for name, t in state(model).items()} == tensors, "other tensor objects"
    assert [sorted(vars(m)) for m in model.modules()] == keys, "attributes came or went"
    for name, tensor in state(model).items():
        assert torch.equal(copied[name], tensor), f"{name} changed"
