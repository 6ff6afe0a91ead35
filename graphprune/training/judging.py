"""Whether a round is good enough: by its evaluation, or by what it lost on single examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.errors import InputError
from graphprune.ranks import Ranks
from graphprune.record.batches import at_rest
from graphprune.training.search.bounds import upper_bound
from graphprune.training.search.checks import check_examples, check_unit
from graphprune.training.search.evaluating import check_alike, span_of
from graphprune.training.users import Evaluate, NotFinite, run_evaluation

CONFIDENCE = 0.95


class Judge:
    """Evaluates models, and compares them with a floor or with the original.

    Args:
        evaluate: the user's function. With ``max_drop`` it may return a number for every example,
            of which the mean is the evaluation.
        floor: the least evaluation allowed.
        max_drop: how much less than the original's it may be.
        ranks: all of them evaluate, each its own examples.
    """

    def __init__(
        self, evaluate: Evaluate, floor: float | None, max_drop: float | None, ranks: Ranks
    ) -> None:
        self.evaluate, self.floor, self.max_drop, self.ranks = evaluate, floor, max_drop, ranks
        self.base: np.ndarray | None = None  # scores of the original
        self.last: np.ndarray | None = None  # of the model that was evaluated last

    def original(self, model: nn.Module) -> float:
        """The evaluation of the original, which is left as it was.

        Raises:
            InputError: it is not finite, below the floor, or of too few examples.
        """
        try:
            with at_rest(model):
                accuracy = self.of(model)
        except NotFinite as error:
            raise InputError(f"the original model: {error}") from None
        if self.floor is not None and accuracy < self.floor:
            raise InputError(
                f"the original itself evaluates to {accuracy:.6g}, below the floor {self.floor:g}"
            )
        if self.max_drop is not None:
            self.base = self.last
            scores = self._gathered(self.base, "the original")
            whole = np.array([accuracy]) if scores is None else np.concatenate(scores)
            check_unit(whole, self.max_drop)
            check_examples(whole, self.max_drop, CONFIDENCE)
            self.floor = accuracy - self.max_drop
        return accuracy

    def of(self, model: nn.Module) -> float:
        """The evaluation of a model, which is put in eval mode.

        Raises:
            InputError: it is no number.
            NotFinite: it is not finite on any rank.
        """
        return run_evaluation(self._mean, model, self.ranks)

    def most(self) -> float | None:
        """The bound of the drop of the last model; ``None`` for evaluations of one number.

        Raises:
            InputError: its scores are of other examples than those of the original.
        """
        if self.base is None:
            return None
        what = "a small model"
        if self.last is not None:
            check_alike(self.last, self.base, what)
        small, whole = self._gathered(self.last, what), self._gathered(self.base, what)
        assert small is not None
        assert whole is not None
        lost = np.concatenate(whole) - np.concatenate(small)
        return upper_bound(lost, span_of(*whole, *small), CONFIDENCE)

    def _gathered(self, scores: np.ndarray | None, what: str) -> list[np.ndarray] | None:
        """The scores of all ranks, ``None`` where these are single numbers."""
        found: list[np.ndarray] = [s for s in self.ranks.share(scores) if s is not None]
        if 0 < len(found) < self.ranks.size or (self.base is not None and not found):
            raise InputError(
                f"evaluate returned one number for {what}, and elsewhere a number for every "
                "example: it must always return the same"
            )
        return found or None

    def keeps(self, accuracy: float, most: float | None) -> bool:
        """Whether a model with such an evaluation, and bound of its drop, is good enough."""
        if most is not None and self.max_drop is not None:
            return most <= self.max_drop
        return self.floor is None or accuracy >= self.floor

    @property
    def words(self) -> tuple[str, str]:
        """What is said of a round that is not good enough, and of the end for that reason."""
        if self.max_drop is None:
            return "below the floor: undone", "the floor was broken"
        return "lost more than max_drop: undone", "more than max_drop was lost"

    def _mean(self, model: nn.Module) -> Any:
        """What the user's function returns, or the mean of the scores of examples."""
        value = self.evaluate(model)
        self.last = None
        several = isinstance(value, Tensor | np.ndarray | list | tuple)
        if self.max_drop is None or not several:
            return value
        try:
            scores = torch.as_tensor(value).detach().cpu().to(torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return value
        if scores.dim() != 1 or scores.numel() < 2:
            return value
        self.last = scores.numpy()
        return float(scores.mean())
