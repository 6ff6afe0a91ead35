"""Names for modules and tensors: those of the model that the file was made from, where it tells."""

from __future__ import annotations

import re

from graphprune.deploy.reading.document import Node

_WORD = re.compile(r"\w+", re.ASCII)


class Names:
    """Paths of modules and tensors, all different, none inside a layer."""

    def __init__(self) -> None:
        self.leaves: set[str] = set()
        self.folders: set[str] = set()

    def layer(self, node: Node, weight: str) -> str:
        """Where a layer goes: where its weight was, or else where the node comes from.

        Exporters store equal weights once: then ``weight`` is empty.
        """
        own = _path(weight).rpartition(".")[0] if weight else ""
        return self.take(own or ".".join(node.scopes) or node.op.lower())

    def beside(self, node: Node, what: str) -> str:
        """Where something of a node goes that is no layer: into the module that it comes from."""
        return self.take(".".join((*node.scopes, what)))

    def take(self, wanted: str) -> str:
        """A path that is free, near the wanted one."""
        wanted = _path(wanted) or "value"
        if any(head in self.leaves for head in _heads(wanted)):
            wanted = wanted.replace(".", "_")  # nothing goes into a layer
        path, number = wanted, 1
        while path in self.leaves or path in self.folders:
            number += 1
            path = f"{wanted}_{number}"
        self.leaves.add(path)
        self.folders.update(_heads(path))
        return path


def word(name: str) -> str:
    """A name as Python takes it."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
    return found if found and not found[0].isdigit() else f"value_{found}"


def last_word(name: str) -> str:
    """What stands behind the path in the name of a value: ``Add`` of ``/layer1/Add_output_0``."""
    return word(name.rpartition("/")[2].removesuffix("_output_0"))


def _path(name: str) -> str:
    """A dotted name of words; empty for names that an exporter made up (``onnx::Conv_12``)."""
    parts = name.split(".")
    return name if all(_WORD.fullmatch(part) for part in parts) else ""


def _heads(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:place]) for place in range(1, len(parts))]
