"""Models that shrink together with the one that is trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from graphprune.errors import InputError
from graphprune.record.tensors import fingerprint


def copies_of(model: nn.Module, copies: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """The models inside moving averages.

    Raises:
        InputError: one of them is no copy of the model.
    """
    found = []
    wanted = fingerprint(model)
    for number, copy in enumerate([copies] if isinstance(copies, nn.Module) else copies):
        is_model = isinstance(copy, nn.Module)
        inner = copy if is_model and fingerprint(copy) == wanted else getattr(copy, "module", copy)
        if not isinstance(inner, nn.Module) or fingerprint(inner) != wanted or inner is model:
            raise InputError(
                f"copies[{number}] is no copy of the model: pass models of the same architecture, "
                "such as torch.optim.swa_utils.AveragedModel(model)"
            )
        found.append(inner)
    return found
