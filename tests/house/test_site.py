"""The site: every page is in it, and it builds without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
MADE = {"index.md", "reference.md"}  # by hooks


def test_every_page_is_in_the_navigation_once():
    text = CONFIG.read_text(encoding="utf-8")
    named = re.findall(r"([\w/-]+\.(?:md|ipynb))$", text.partition("\nnav:")[2], re.MULTILINE)
    assert len(named) == len(set(named))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"api.md"}
    books = {f"notebooks/{book.name}" for book in (ROOT / "docs" / "notebooks").iterdir()}
    assert set(named) == pages | books | MADE


@pytest.mark.slow
@pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter")
    ),
    reason="the extra docs is not installed",
)
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG)]
    command += ["-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in ("graphprune.rebuild", "graphprune.Plan.report", "graphprune.training.History"):
        assert f'id="{name}"' in page, name
    assert ":func:" not in page
    assert (tmp_path / "site" / "index.html").exists()
