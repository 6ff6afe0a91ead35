"""The user's ``train`` and ``evaluate``: what they may return, and what they must not do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.batches import device_of
from graphprune.checks import check_model
from graphprune.errors import InputError, ModelError
from graphprune.plan import fingerprint
from graphprune.skeleton import mark, named_tensors

Evaluate = Callable[[nn.Module], Any]


class NotFinite(Exception):
    """A loss, a weight or an evaluation is not finite; the text says which."""


def run_training(train: Callable[..., Any], model: nn.Module, *more: Any) -> None:
    """Call ``train(model, *more)``, which trains in place; a generator yields its losses.

    Raises:
        InputError: it replaced the model, or changed none of its weights.
        NotFinite: a loss that it returned or yielded, or a weight, is not finite.
    """
    architecture, weights = fingerprint(model), _versions(model)
    model.train()
    result = train(model, *more)
    if isinstance(result, nn.Module) and result is not model:
        raise InputError(
            f"train returned another model ({type(result).__name__}): it must train the model "
            "it is given, in place"
        )
    for count, loss in enumerate(result if isinstance(result, Iterator) else [result], 1):
        single = isinstance(loss, Tensor) and loss.numel() == 1
        found = float(loss.detach()) if single else loss
        if isinstance(found, int | float) and not math.isfinite(found):
            raise NotFinite(f"the loss is {found} (number {count})")
    if fingerprint(model) != architecture:
        raise InputError(
            "train changed the architecture of the model that it was given: it must train the "
            "layers that are there"
        )
    if _versions(model) == weights:
        raise InputError(
            "train changed no weight of the model that it was given: the smaller model has new "
            "parameters, so make the optimizer inside train, from model.parameters(); for "
            "rounds without training pass train=None"
        )
    try:
        check_model(model)
    except ModelError as error:
        raise NotFinite(f"after training, {error}") from None


def run_evaluation(evaluate: Evaluate, model: nn.Module) -> float:
    """Call ``evaluate`` on a model in eval mode.

    Raises:
        InputError: it returned no number.
        NotFinite: the number is not finite.
    """
    model.eval()
    value = evaluate(model)
    try:
        found = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"evaluate must return a number, not {type(value).__name__}") from None
    if not math.isfinite(found):
        raise NotFinite(f"the evaluation is {found}")
    return found


@contextlib.contextmanager
def own_numbers(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of a seed inside; the user's go on afterwards as if nothing had been drawn."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_callables(train: Any, evaluate: Any) -> None:
    """Raise unless both can be called; ``train`` may be ``None``."""
    if not (train is None or callable(train)) or not callable(evaluate):
        raise InputError("train and evaluate must be functions of a model")


def _versions(model: nn.Module) -> tuple[float, tuple[int, ...]]:
    """What tells whether any tensor was written to, or put in the place of another."""
    return mark(model), tuple(tensor._version for _, tensor in named_tensors(model))
