"""``graphprune shrink MODEL --out small.onnx``: the small model as a file for an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.cli.session import Session
from graphprune.deploy.exporting import Exported, export
from graphprune.errors import InputError


def goes_to_onnx(out: Path | None, others: Mapping[str, object]) -> bool:
    """Whether ``out`` is a file of ONNX.

    Raises:
        InputError: ``others``, options that need the small model as tensors, were given with it.
    """
    if out is None or out.suffix.lower() != ".onnx":
        return False
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise InputError(
            f"{', '.join(given)} needs the small model itself, and --out {out} is a file of ONNX: "
            f"pass --out {out.stem}.safetensors, and write ONNX with graphprune export MODEL "
            f"{out.stem}.safetensors --out {out}, which writes a certificate as well"
        )
    return True


def write_onnx(run: Session, small: nn.Module, out: Path, example: Any, seed: int) -> Exported:
    """Write the small model as ONNX, compared with it in ONNX Runtime.

    Raises:
        ExportError: it cannot be exported.
        VerificationError: the engine computes something else; no file is left.
    """
    with run.status("exporting"):
        return export(small, out, example, seed=seed, certificate=False)
