"""What the site makes of the pages: the README is its start, docstrings are its reference."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
CODE = "https://github.com/graphprune/graphprune"
OWN = re.compile(rf"{CODE}/blob/main/docs/([\w-]+\.md)")
API = re.compile(r"\]\(api\.md(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """The README is the first page; a page of the reference names what is public."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=OWN.sub(r"\1", text)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to what lies beside the pages lead to the repository, those to the API here."""
    markdown = re.sub(r"\]\(\.\./([^)]+)\)", rf"]({CODE}/tree/main/\1)", markdown)
    return API.sub(lambda link: f"](reference.md{link[1] or ''})", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Names that docstrings mark for other tools are names."""
    return re.sub(r":(?:func|meth|class|mod):<code>~?([\w.]+)</code>", r"<code>\1</code>", html)


def reference() -> str:
    """A heading for every chapter, and the names that docstrings are looked up by."""
    sys.path.insert(0, str(ROOT / "docs"))
    from make_api import chapters

    lines = ["# Reference", "", "From the docstrings, whose examples are run by the tests."]
    for title, package, things in chapters():
        lines += ["", f"## {title}", ""]
        for thing in things:
            public = thing.__name__ in vars(importlib.import_module(package))
            lines.append(f"::: {package if public else thing.__module__}.{thing.__name__}")
    lines += ["", "## Errors", "", "::: graphprune.errors"]
    return "\n".join([*lines, ""])
