"""What a user's evaluation says of a model: one number, or one for every example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.errors import InputError
from graphprune.record.batches import at_rest, device_of
from graphprune.record.random_numbers import same_numbers

Evaluate = Callable[[nn.Module], object]
_WANTED = "evaluate must return a number, larger for better models, or a number for every example"


def evaluated(
    evaluate: Evaluate, model: nn.Module, what: str, seed: int, empty: bool = False
) -> np.ndarray:
    """The scores of a model in eval mode, [examples] or [1], in float64.

    Args:
        evaluate: the user's function, called without gradients; its random numbers are the same
            for every model.
        model: is left as it was.
        what: the model in words, for errors.
        seed: of these random numbers.
        empty: whether it may have no examples.

    Raises:
        InputError: it returned no finite number, or several that are not in a row.
    """
    with at_rest(model), same_numbers(seed, device_of(model)), torch.no_grad():
        try:
            returned: Any = evaluate(model)
        except Exception as error:
            error.add_note(f"raised by evaluate, on {what}")
            raise
    return checked(returned, what, empty)


def checked(returned: Any, what: str, empty: bool = False) -> np.ndarray:
    """Scores as an array, [examples] or [1].

    Raises:
        InputError: they are none.
    """
    kind = type(returned).__name__
    if isinstance(returned, bool | str | bytes) or returned is None:
        raise InputError(f"{_WANTED}; got {kind} for {what}")
    try:
        value = torch.as_tensor(returned).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{_WANTED}; got {kind} for {what}") from None
    if value.dim() > 1 or value.is_complex() or not (value.numel() or empty):
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise InputError(f"{_WANTED}; got {kind} {found} for {what}")
    scores = value.reshape(-1).to(torch.float64).numpy()
    bad = ~np.isfinite(scores)
    if bad.any():
        some = "" if len(scores) == 1 else f"{int(bad.sum())} of {len(scores)} examples, "
        raise InputError(
            f"evaluate must return finite numbers; got {scores[bad][0]} for {some}{what}"
        )
    return scores


def together(found: Sequence[np.ndarray], what: str) -> np.ndarray:
    """The scores of several processes as one row, or the mean of their numbers.

    Raises:
        InputError: some have a number for every example, and others a single one.
    """
    single = [len(scores) == 1 for scores in found]
    if all(single):
        return np.array([np.mean(found)])
    if any(single):
        raise InputError(
            f"evaluate returned one number for {what} on some ranks, and a number for every "
            "example on others: all must return the same"
        )
    return np.concatenate(found)


def check_alike(scores: np.ndarray, base: np.ndarray, what: str) -> None:
    """Raise unless scores are of as many examples as those of the original."""
    if len(scores) != len(base):
        raise InputError(
            f"evaluate returned {len(base)} numbers for the original and {len(scores)} for {what}: "
            "they must be of the same examples, in the same order"
        )


def span_of(*scores: np.ndarray) -> float:
    """By how much one example can lose: how far scores, and zero, lie apart."""
    return max(0.0, *(float(s.max()) for s in scores)) - min(0.0, *(float(s.min()) for s in scores))


def right_or_wrong(scores: np.ndarray) -> bool:
    """Whether every example has one of two scores, one of which is zero."""
    return len(scores) > 1 and bool(np.isin(scores, (0.0, span_of(scores))).all())
