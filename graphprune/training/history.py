"""What became of a model while it was pruned: a table, CSV, TensorBoard, plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from graphprune.errors import InputError
from graphprune.measurement import count_text, measure
from graphprune.record.tensors import named_modules
from graphprune.text import render
from graphprune.training.plots import draw_value, draw_widths
from graphprune.training.ranks import unwrapped_model

FORMAT = "graphprune-history"


@dataclass(frozen=True)
class Entry:
    """A model at one step.

    Attributes:
        step: a number that grows: of the step, epoch or round.
        params: its parameters.
        macs: its multiply-accumulates on the example inputs.
        values: what else was measured, such as ``accuracy`` and ``sparsity``, by name.
        widths: the output channels of its layers, by name.
        note: a remark for the table.
    """

    step: int
    params: int
    macs: int
    values: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


class History:
    """A model over time; ``print`` it, or write it as CSV, TensorBoard scalars or plots.

    Args:
        example_inputs: as for ``graphprune.trace``; what MACs are counted on.
        entries: what there is already.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import History
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> history = History(torch.ones(1, 4))
        >>> _ = history.record(net, 0, accuracy=0.75)
        >>> _ = history.record(graphprune.rebuild(net, 0.5), 1, accuracy=0.5)
        >>> print(history)
        step  parameters  MACs  accuracy  note
        ----  ----------  ----  --------  ----
        0     58          48    0.75
        1     30          24    0.5
    """

    def __init__(self, example_inputs: object = None, entries: Iterable[Entry] = ()) -> None:
        self.example_inputs = example_inputs
        self.entries = list(entries)

    def record(
        self, model: nn.Module, step: int | None = None, note: str = "", **values: float
    ) -> Entry:
        """Measure a model and add an entry.

        Args:
            model: as it is now; masked channels count until they are removed.
            step: the next number when absent.
            note: a remark for the table.
            values: numbers to keep with it: ``accuracy=0.93``.

        Raises:
            InputError: a value is no number.
        """
        model = unwrapped_model(model)
        found = measure(model, self.example_inputs, latency=False)
        number = 1 + max((e.step for e in self.entries), default=-1) if step is None else step
        checked = {name: _number(name, value) for name, value in values.items()}
        entry = Entry(number, found.parameters, found.macs, checked, widths_of(model), note)
        self.entries.append(entry)
        return entry

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.values))

    def __str__(self) -> str:
        """A table, one entry a line."""
        rows = [
            (
                entry.step,
                count_text(entry.params),
                count_text(entry.macs),
                *(_text(entry.values.get(name)) for name in self.names),
                entry.note,
            )
            for entry in self.entries
        ]
        return render("", ("step", "parameters", "MACs", *self.names, "note"), rows)

    def to_csv(self, path: str | Path) -> Path:
        """Write one line for each entry; the widths of layers are columns ``width/<layer>``."""
        layers = self._layers()
        header = ["step", "params", "macs", *self.names, *(f"width/{n}" for n in layers), "note"]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        for entry in self.entries:
            values = [entry.values.get(name, "") for name in self.names]
            widths = [entry.widths.get(name, "") for name in layers]
            writer.writerow([entry.step, entry.params, entry.macs, *values, *widths, entry.note])
        try:
            Path(path).write_text(text.getvalue(), encoding="utf-8", newline="")
        except OSError as error:
            raise InputError(f"cannot write {str(path)!r}: {error}") from None
        return Path(path)

    def to_json(self) -> str:
        """All entries as JSON text, which :meth:`from_json` reads."""
        entries = [asdict(entry) for entry in self.entries]
        return json.dumps({"format": FORMAT, "entries": entries})

    @classmethod
    def from_json(cls, text: str, example_inputs: object = None) -> History:
        """Read a history back.

        Raises:
            InputError: not what :meth:`to_json` wrote.
        """
        try:
            outer = json.loads(text)
            if outer["format"] != FORMAT:
                raise KeyError("format")
            return cls(example_inputs, [Entry(**entry) for entry in outer["entries"]])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"this is no history: {type(error).__name__} {error}") from None

    def to_tensorboard(self, writer: object) -> None:
        """Write all numbers as scalars: ``pruning/params``, ``pruning/macs``, values and widths.

        Args:
            writer: a ``SummaryWriter``, or the folder for one.

        Raises:
            InputError: TensorBoard is not installed.
        """
        if hasattr(writer, "add_scalar"):
            self._write_scalars(writer)
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"TensorBoard is not installed ({error}): pip install tensorboard, or pass a "
                "writer with add_scalar(name, value, step)"
            ) from None
        with SummaryWriter(str(writer)) as own:
            self._write_scalars(own)

    def _write_scalars(self, writer: Any) -> None:
        for entry in self.entries:
            scalars = {"params": entry.params, "macs": entry.macs, **entry.values}
            scalars |= {f"width/{name}": width for name, width in entry.widths.items()}
            for name, value in scalars.items():
                writer.add_scalar(f"pruning/{name}", value, entry.step)

    def plot(self, path: str | Path, value: str = "accuracy", against: str = "macs") -> Path:
        """Draw a value against the cost of the model.

        Args:
            path: where to write; the suffix chooses the format (.svg, .png, .pdf).
            value: the name of a value.
            against: ``"macs"``, ``"params"``, ``"step"`` or the name of another value.

        Raises:
            InputError: no entry has such a value.
        """
        points = []
        for entry in self.entries:
            known = {"step": entry.step, "params": entry.params, "macs": entry.macs, **entry.values}
            if value in known and against in known:
                kept = bool(known.get("kept", 1))
                points.append((known[against], known[value], entry.step, kept))
        if not points:
            names = ", ".join(("step", "params", "macs", *self.names))
            raise InputError(f"no entry has both {value!r} and {against!r}; known are {names}")
        return draw_value(path, points, value, against)

    def plot_widths(self, path: str | Path) -> Path:
        """Draw the width of every layer over the steps, as a fraction of its first width.

        Args:
            path: where to write; the suffix chooses the format (.svg, .png, .pdf).

        Raises:
            InputError: there are no entries.
        """
        layers = self._layers()
        if not layers:
            raise InputError("no entry has widths of layers: record(model, step) first")
        return draw_widths(path, widths_over(self.entries))

    def _layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.widths))


def widths_over(entries: Sequence[Entry]) -> dict[str, list[tuple[int, int]]]:
    """The steps and widths of every layer."""
    layers = dict.fromkeys(name for entry in entries for name in entry.widths)
    return {
        name: [(e.step, e.widths[name]) for e in entries if name in e.widths] for name in layers
    }


def widths_of(model: nn.Module) -> dict[str, int]:
    """The output channels of all layers that have a weight of two or more dimensions.

    Args:
        model: any module.

    Example:
        >>> import torch
        >>> from graphprune.training.history import widths_of
        >>> widths_of(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
        {'0': 8}
    """
    found = {}
    for name, module in named_modules(model):
        weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
        if weight is None or weight.dim() < 2:
            continue
        if isinstance(module, nn.Embedding):
            found[name] = weight.shape[1]
        elif isinstance(module, _ConvTransposeNd):
            found[name] = weight.shape[1] * module.groups
        else:
            found[name] = weight.shape[0]
    return found


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a number, got {value!r}") from None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
