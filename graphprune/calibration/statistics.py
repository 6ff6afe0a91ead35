"""Re-estimation of the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import InputError
from graphprune.ranks import Ranks
from graphprune.record.batches import device_of, evaluated, forward

_MOMENTS = ("running_mean", "running_var")


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def reestimate(model: nn.Module, data: Iterable[object], ranks: Ranks | None = None) -> list[str]:
    """Replace the running statistics of every BatchNorm by averages over batches.

    The model runs in eval mode but for its BatchNorms, so that dropout stays off.

    Args:
        model: what is changed.
        data: batches.
        ranks: which have other batches: the averages are those over all.

    Returns:
        The names of the BatchNorms.

    Raises:
        InputError: there is none, or the model does not run; then nothing was changed.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and has_statistics(module)
    }
    if not norms:
        raise InputError(
            "the small model has no BatchNorm with running statistics: "
            'pass method="repair" or method="bias"'
        )
    momenta = [(norm, norm.momentum) for norm in norms.values()]
    known = [(b, b.detach().clone()) for norm in norms.values() for b in norm.buffers()]
    counts = [n.num_batches_tracked for n in norms.values() if n.num_batches_tracked is not None]
    before = [count.detach().clone() for count in counts]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), evaluated(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            for batch in data:
                forward(model, batch)
            _average(norms, ranks or Ranks(False))
    except BaseException:
        with torch.no_grad():
            for buffer, value in known:
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for count, value in zip(counts, before):
            count.copy_(value)
    return list(norms)


def _average(norms: Mapping[str, _BatchNorm], ranks: Ranks) -> None:
    """Give all ranks the averages over the batches of all."""
    if ranks.size == 1:
        return
    own: dict[tuple[str, str], Tensor] = {}
    for name, norm in norms.items():
        assert norm.num_batches_tracked is not None  # a cumulative average counts
        own[name, "count"] = norm.num_batches_tracked.double()
        for each in _MOMENTS:
            own[name, each] = getattr(norm, each).double() * norm.num_batches_tracked
    found = ranks.sums(own)
    for name, norm in norms.items():
        for each in _MOMENTS:
            if found[name, "count"]:
                getattr(norm, each).copy_(found[name, each] / found[name, "count"])
