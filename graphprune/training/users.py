"""The user's ``train`` and ``evaluate``: what they may return, and what they must not do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError, ModelError
from graphprune.ranks import Ranks
from graphprune.record.batches import device_of
from graphprune.record.checks import check_model
from graphprune.record.tensors import fingerprint, mark, named_tensors

Evaluate = Callable[[nn.Module], Any]
_WRAP = "wrap the model in DistributedDataParallel inside train, so that all ranks train the same"


class NotFinite(Exception):
    """A loss, a weight or an evaluation is not finite; the text says which."""


def run_training(
    train: Callable[..., object], model: nn.Module, *more: object, ranks: Ranks
) -> None:
    """Call ``train(model, *more)``, which trains in place; a generator yields its losses.

    Args:
        train: the user's function.
        model: what it is given.
        *more: further arguments.
        ranks: all of them train. One alone stops at a loss that is not finite; of several each
            comes to the end of its training, as others may wait for it there.

    Raises:
        InputError: it replaced the model, or changed none of its weights.
        NotFinite: a loss that it returned or yielded on any rank, or a weight, is not finite.
        RankError: the ranks have trained different models.
    """
    architecture, weights, buffers = fingerprint(model), *_versions(model)
    model.train()
    result = train(model, *more)
    if isinstance(result, nn.Module) and result is not model:
        raise InputError(
            f"train returned another model ({type(result).__name__}): it must train the model "
            "it is given, in place"
        )
    bad = ""
    for count, loss in enumerate(result if isinstance(result, Iterator) else [result], 1):
        found = _not_finite(loss)
        if found is not None and not bad:
            bad = f"the loss is {found} (number {count})"
        if bad and ranks.size == 1:
            break
    _raise_together(bad, ranks)
    if fingerprint(model) != architecture:
        raise InputError(
            "train changed the architecture of the model that it was given: it must train the "
            "layers that are there"
        )
    unused = any(p.grad is not None for p in model.parameters())  # gradients that moved nothing
    now = _versions(model)
    if now[0] == weights and (now[1] == buffers or unused):
        raise InputError(
            "train changed no weight of the model that it was given: the smaller model has new "
            "parameters, so make the optimizer inside train, from model.parameters(); for "
            "rounds without training pass train=None"
        )
    try:
        check_model(model)
    except ModelError as error:
        bad = f"after training, {error}"
    _raise_together(bad, ranks)
    parameters, _ = _versions(model)
    ranks.check("the weights after training", f"{parameters[0]:.6g}", _WRAP)


def run_evaluation(evaluate: Evaluate, model: nn.Module, ranks: Ranks) -> float:
    """Call ``evaluate`` on a model in eval mode.

    Args:
        evaluate: the user's function.
        model: what it is given.
        ranks: the mean over all of them counts.

    Raises:
        InputError: it returned no number.
        NotFinite: the number is not finite on any rank.
    """
    model.eval()
    value = evaluate(model)
    try:
        found = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"evaluate must return a number, not {type(value).__name__}") from None
    _raise_together("" if math.isfinite(found) else f"the evaluation is {found}", ranks)
    return float(ranks.mean(torch.tensor(found, dtype=torch.float64)))


@contextlib.contextmanager
def own_numbers(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of a seed inside; the user's go on afterwards as if nothing had been drawn."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_callables(train: object, evaluate: object) -> None:
    """Raise unless both can be called; ``train`` may be ``None``."""
    if not (train is None or callable(train)) or not callable(evaluate):
        raise InputError("train and evaluate must be functions of a model")


def _raise_together(text: str, ranks: Ranks) -> None:
    """Raise on all ranks what is wrong on any."""
    for rank, other in enumerate(ranks.share(text)):
        if other:
            raise NotFinite(other if ranks.size == 1 else f"{other} on rank {rank}")


def _not_finite(losses: object) -> float | None:
    """The first number that is not finite of a loss, or of several in containers.

    Of a mapping with losses among other things only the losses count.
    """
    if isinstance(losses, Mapping):
        named = {name: value for name, value in losses.items() if "loss" in str(name).lower()}
        losses = named or losses
    for leaf in pytree.tree_leaves(losses):
        if isinstance(leaf, Tensor):
            bad = leaf.detach()[~leaf.detach().isfinite()]
            if bad.numel():
                return float(bad[0].real)
        elif isinstance(leaf, int | float) and not math.isfinite(leaf):
            return leaf
    return None


def _versions(model: nn.Module) -> tuple[Any, Any]:
    """What tells whether parameters, or buffers, were written to or put in others' places."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in named_tensors(model):
        parts[not isinstance(tensor, nn.Parameter)][name] = tensor
    first, second = ((mark(p), tuple(t._version for t in p.values())) for p in parts)
    return first, second
