"""What the numbers were measured on, and where they are written."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torchvision

TITLE = "# Benchmarks\n"


def describe() -> str:
    """Processor, cores and versions."""
    return (
        f"{_processor()} ({os.cpu_count()} cores), Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if fields else name


def replace_section(path: Path, title: str, text: str) -> None:
    """Replace the ``## title`` section of a Markdown file, or append it."""
    old = path.read_text() if path.exists() else TITLE
    before, heading, rest = old.partition(f"## {title}\n")
    if not heading:
        path.write_text(f"{old.rstrip()}\n\n{text}\n")
        return
    _, following, after = rest.partition("\n## ")
    path.write_text(f"{before}{text}\n{following}{after}")
