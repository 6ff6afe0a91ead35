"""Where commands write: never onto what they read, and under names that say what is inside."""

from __future__ import annotations

from pathlib import Path

from graphprune.cli.session import check_folders
from graphprune.cli.to_folder import goes_to_folder
from graphprune.errors import InputError

_OTHERS = {".pt2", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".npz", ".h5"}


def check_places(model: str, *read: Path | None, **outs: Path | None) -> None:
    """What is written has a folder, a name that fits, and is nothing that the command reads.

    Args:
        model: the text that names the model.
        read: other files that are read.
        outs: what is written, by option.

    Raises:
        InputError: something of this is not so, told before anything long is done.
    """
    out = outs.get("out")
    check_kind(out)
    folder = goes_to_folder(model, out)
    check_folders(*(path for path in outs.values() if path is None or path is not folder))
    options = {f"--{name.replace('_', '-')}": path for name, path in outs.items()}
    check_apart(options, model, *read)


def check_apart(outs: dict[str, Path | None], model: str, *read: Path | None) -> None:
    """Nothing that is written may be a file that the command reads.

    Args:
        outs: what is written, by option.
        model: the text that names the model.
        read: other files that are read.

    Raises:
        InputError: one of them is.

    Example:
        >>> check_apart({"--out": Path("small.onnx")}, "onnx:net.onnx")
    """
    texts = model.rpartition(":")[0], model.partition(":")[2]  # file.py:name, and onnx:file
    sources = [path for path in read if path is not None] + [Path(text) for text in texts if text]
    for option, out in outs.items():
        if out is not None and any(_same(out, source) for source in sources):
            raise InputError(
                f"{option} {out} is the file that the command reads: name another, so that "
                "nothing is lost"
            )


def check_kind(out: Path | None) -> None:
    """The suffix of a small model that is written must not promise another format.

    Raises:
        InputError: it does.

    Example:
        >>> check_kind(Path("small.safetensors"))
    """
    if out is None or out.suffix.lower() not in _OTHERS:
        return
    raise InputError(
        f"--out {out}: {out.suffix} is not what is written here; --out writes .safetensors or "
        f".onnx (of hf:FOLDER, a folder where it has no suffix), and graphprune export "
        "writes .pt2"
    )


def _same(one: Path, other: Path) -> bool:
    try:
        if one.exists() and other.exists():
            return one.samefile(other)  # through links, and where case does not count
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError, ValueError):  # no path at all, or links in a circle
        return False
