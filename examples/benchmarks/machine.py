"""What the numbers were measured on, and where they are written."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torchvision

from graphprune.planning.latency import processor

TITLE = "# Benchmarks\n"


def describe() -> str:
    """Processor, cores and versions."""
    return (
        f"{processor()} ({os.cpu_count()} cores), Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def replace_section(path: Path, title: str, text: str) -> None:
    """Replace the ``## title`` section of a Markdown file, or append it."""
    old = path.read_text() if path.exists() else TITLE
    before, heading, rest = old.partition(f"## {title}\n")
    if not heading:
        path.write_text(f"{old.rstrip()}\n\n{text}\n")
        return
    _, following, after = rest.partition("\n## ")
    path.write_text(f"{before}{text}\n{following}{after}")
