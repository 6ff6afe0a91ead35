"""Folders of sentence-transformers: the parts in them are folders of transformers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphprune.deploy.folders import of_transformers
from graphprune.deploy.folders.plans import ENTRY
from graphprune.execute.saving import WRITERS, Offer
from graphprune.record.tensors import named_modules


class SentencesWriter:
    """Lets the parts be saved by themselves."""

    def fits(self, offer: Offer) -> bool:
        """Models of which nothing changed but parts of transformers."""
        kind = getattr(sys.modules.get("sentence_transformers"), "SentenceTransformer", None)
        return kind is not None and isinstance(offer.module, kind) and self.whole(offer)

    def whole(self, offer: Offer) -> bool:
        """Whether all that changed is in parts that are saved by themselves."""
        base: Any = of_transformers._base_class()
        parts = tuple(
            f"{name}." for name, module in named_modules(offer.module) if isinstance(module, base)
        )
        return all(slot.tensor.startswith(parts) for slot in offer.plan.slots)

    def write(self, offer: Offer, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Write a folder."""
        module: Any = offer.module
        return type(module).save_pretrained(module, *args, **options)


WRITERS.append(SentencesWriter())


def load(folder: Path, options: dict[str, Any]) -> Any:
    """A model from a folder, whose small parts are loaded without code of the folder."""
    from sentence_transformers import SentenceTransformer

    dtype = options.pop("dtype", options.pop("torch_dtype", None))
    if dtype is not None:
        options["model_kwargs"] = {**options.get("model_kwargs", {}), "torch_dtype": dtype}
    with _known(folder):
        return SentenceTransformer(str(folder), **options).eval()


@contextlib.contextmanager
def _known(folder: Path) -> Iterator[None]:
    """For a while, auto classes know the small classes of a folder."""
    from transformers import AutoConfig, AutoModel

    held: Any = AutoModel._model_mapping._extra_content
    before = dict(held)
    try:
        for path in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
            if not (path / "config.json").is_file():
                continue
            try:
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            except (OSError, ValueError, KeyError):  # of a part that is none of transformers
                continue
            if getattr(config, ENTRY, None) is not None:
                kind = of_transformers.class_named(config, None, str(path))
                held[type(config)] = of_transformers.small_class(kind)
        yield
    finally:
        held.clear()
        held.update(before)
