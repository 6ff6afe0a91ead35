"""Histories: tables, CSV, JSON, TensorBoard, plots."""

import csv
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import graphprune
from graphprune.errors import InputError
from graphprune.training import Entry, History, iterate
from graphprune.training.history import widths_of

X = torch.randn(4, 6)


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def history():
    """Three models of one network, the last of them undone."""
    found = History(X)
    model = net()
    found.record(model, accuracy=0.9, kept=1)
    found.record(graphprune.rebuild(model, 0.5, X), accuracy=torch.tensor(0.75), kept=1)
    found.record(graphprune.rebuild(model, 0.75, X), 5, "undone", accuracy=0.25, kept=0, extra=1e-6)
    return found


def test_an_entry_is_what_measure_says(history):
    assert [entry.step for entry in history.entries] == [0, 1, 5]
    first = history.entries[0]
    assert (first.params, first.macs) == (74, graphprune.measure(net(), X, latency=False).macs)
    assert [entry.widths for entry in history.entries] == [
        {"0": 8, "2": 2},
        {"0": 4, "2": 2},
        {"0": 2, "2": 2},
    ]
    assert history.entries[1].values == {"accuracy": 0.75, "kept": 1.0}


def test_the_table_has_a_line_for_each_entry(history):
    lines = str(history).splitlines()
    assert lines[0].split() == ["step", "parameters", "MACs", "accuracy", "kept", "extra", "note"]
    assert lines[-1].split() == ["5", "20", "64", "0.25", "0", "1e-06", "undone"]
    assert len(lines) == 5


def test_csv_holds_every_number(history, tmp_path):
    path = history.to_csv(tmp_path / "history.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["width/0"] for row in rows] == ["8", "4", "2"]
    assert [float(row["accuracy"]) for row in rows] == [0.9, 0.75, 0.25]
    assert rows[0]["extra"] == ""
    assert rows[2]["note"] == "undone"


def test_json_comes_back_the_same(history):
    assert History.from_json(history.to_json()).entries == history.entries
    for text in ("", "[]", '{"format": "other"}', '{"format": "graphprune-history", "entries": 1}'):
        with pytest.raises(InputError, match="this is no history"):
            History.from_json(text)


class Writer:
    """What a ``SummaryWriter`` is asked to do."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


def test_scalars_have_names_steps_and_values(history):
    writer = Writer()
    history.to_tensorboard(writer)
    assert ("pruning/accuracy", 0.75, 1) in writer.scalars
    assert ("pruning/width/0", 2, 5) in writer.scalars
    assert ("pruning/params", 74, 0) in writer.scalars
    assert len(writer.scalars) == 3 * (2 + 2 + 2) + 1


def test_tensorboard_reads_what_is_written(history, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history.to_tensorboard(tmp_path)
    found = EventAccumulator(str(tmp_path)).Reload()
    values = {event.step: event.value for event in found.Scalars("pruning/accuracy")}
    assert values == pytest.approx({0: 0.9, 1: 0.75, 5: 0.25})


def test_without_tensorboard_it_says_what_to_install(history, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        history.to_tensorboard(tmp_path)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_written(history, tmp_path, suffix):
    accuracy = history.plot(tmp_path / f"accuracy.{suffix}")
    widths = history.plot_widths(tmp_path / f"widths.{suffix}")
    assert min(accuracy.stat().st_size, widths.stat().st_size) > 2000
    if suffix == "svg":
        assert "undone" not in widths.read_text()
        assert "Line2D" in accuracy.read_text() or "line2d" in accuracy.read_text()


def test_what_is_not_there_cannot_be_plotted(history, tmp_path):
    with pytest.raises(InputError, match="no entry has both 'f1' and 'macs'; known are step"):
        history.plot(tmp_path / "f1.svg", "f1")
    with pytest.raises(InputError, match="no entry has widths"):
        History().plot_widths(tmp_path / "widths.svg")
    with pytest.raises(InputError, match="accuracy must be a number, got 'good'"):
        history.record(net(), accuracy="good")


def test_widths_of_all_kinds_of_layers():
    model = nn.Sequential(
        nn.Embedding(10, 6), nn.Linear(6, 4), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.LayerNorm(3)
    )
    prune.l1_unstructured(model[1], "weight", 0.5)
    assert widths_of(model) == {"0": 6, "1": 4, "2": 6}


def test_the_history_of_rounds_is_one(tmp_path):
    outcome = iterate(net(), 2, None, lambda model: 1.0, example_inputs=X)
    assert isinstance(outcome.history.entries[0], Entry)
    assert outcome.history.to_csv(tmp_path / "rounds.csv").read_text().count("\n") == 4
    outcome.history.plot(tmp_path / "rounds.svg", "accuracy", "params")
