"""``shrink --max-drop``: the smallest model that loses at most so much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.markup import escape
from torch import nn

from graphprune.api import rebuild
from graphprune.cli.int8 import arrays_of
from graphprune.cli.loading import load_named
from graphprune.cli.runtime import smaller
from graphprune.cli.session import Session
from graphprune.errors import InputError
from graphprune.plan.plan import plan_of
from graphprune.planning.options import Options
from graphprune.training.search.smallest import smallest

_BATCH = 64
_FILES = (".npz", ".npy", ".safetensors")


@dataclass(frozen=True)
class Asked:
    """The options of a search, as texts, and others: ratio, runtime, certificate, folder.

    Raises:
        InputError: one is missing, or does not go with a search.
    """

    max_drop: float | None
    evaluate: str | None
    data: str | None
    path: Path | None
    others: tuple[float | None, str, Path | None, Path | None]

    def __post_init__(self) -> None:
        if not self.given:
            texts = {"--evaluate": self.evaluate, "--data": self.data, "--search": self.path}
            alone = [name for name, value in texts.items() if value is not None]
            if alone:
                raise InputError(f"{', '.join(alone)}: for --max-drop, which is missing")
            return
        if self.evaluate is None:
            raise InputError(
                "--max-drop needs --evaluate path/to/file.py:function, which is called with a "
                "model and returns a number, larger for better ones, or one for every example"
            )
        ratio, runtime, certificate, folder = self.others
        unfit = {"--ratio": ratio, "--out of a folder": folder}
        unfit["--runtime"] = None if runtime == "pytorch" else 0.0
        found = [name for name, value in unfit.items() if value is not None]
        if found:
            raise InputError(f"{', '.join(found)}: not with --max-drop")
        if certificate is not None and self.data is not None:
            raise InputError(
                "--certificate: not with --data, as a repaired model no longer equals the masked "
                "original"
            )

    @property
    def given(self) -> bool:
        """Whether there is a search."""
        return self.max_drop is not None

    def small(
        self, run: Session, original: nn.Module, example: object, attention: str, options: Options
    ) -> tuple[nn.Module, dict[str, Any] | None]:
        """The small model, and what a search has found, which is told.

        Raises:
            InputError: no model is good enough, or as :func:`smallest` and ``rebuild``.
        """
        if self.max_drop is None or self.evaluate is None:
            ratio, runtime, *_ = self.others
            with run.status("analysing"):
                return smaller(runtime, original, ratio, example, attention, options), None
        found = smallest(
            original,
            load_named(self.evaluate, "--evaluate"),
            None if self.data is None else batches_of(self.data),
            self.max_drop,
            example_inputs=example,
            attention=attention,
            path=self.path,
            progress=not run.as_json,
            **cast(dict[str, Any], options),
        )
        if found.chosen is None:
            raise InputError(str(found))
        run.print(escape(str(found)))
        return found.model, found.to_dict()

    def to_verify(self, original: nn.Module, small: nn.Module) -> nn.Module:
        """The model that equals the masked original: a repaired one as it was before that."""
        plan = plan_of(small) if self.given and self.data is not None else None
        return small if plan is None else rebuild(original, plan)


def batches_of(text: str) -> list[Any]:
    """Batches from a file of arrays by the names of the inputs, or from the user's code.

    Raises:
        InputError: there are none.
    """
    if Path(text).suffix.lower() not in _FILES:
        named = load_named(text, "--data")
        return list(named() if callable(named) else named)
    if not Path(text).is_file():
        raise InputError(f"no file {text!r}")
    arrays = {name: a for name, a in arrays_of(Path(text)).items() if name != "labels"}
    counts = {len(array) if array.dim() else 0 for array in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"the data hold different numbers of items: {sorted(counts)}")
    starts = range(0, counts.pop(), _BATCH)
    parts = [{name: a[s : s + _BATCH] for name, a in arrays.items()} for s in starts]
    return [next(iter(part.values())) for part in parts] if len(arrays) == 1 else list(parts)
