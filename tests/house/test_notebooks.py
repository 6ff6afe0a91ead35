"""Notebooks run from their first cell to their last, and are kept without output."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
RUN = [pytest.param(book, marks=[pytest.mark.slow] * (book.stem != "resnet")) for book in BOOKS]


def cells(book, kind):
    content = json.loads(book.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_some():
    assert BOOKS


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")  # of how much is lost
@pytest.mark.parametrize("book", RUN, ids=lambda book: book.stem)
def test_a_notebook_runs(book, tmp_path, monkeypatch, capsys):
    if book.stem == "resnet":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for number, source in enumerate(cells(book, "code")):
        exec(compile(source, f"{book.name}, code cell {number}", "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_a_notebook_is_kept_without_output(book):
    content = json.loads(book.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert cells(book, "markdown")[0].startswith("# ")
