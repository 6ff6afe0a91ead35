"""The class of models that were read from ONNX: copies and pickles keep what they know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

_KNOWN = ("onnx_source", "graphprune_plan")  # what no graph refers to


class OnnxModule(fx.GraphModule):
    """A graph module whose file, and plan where it is a smaller one, stay with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        """A copy; the records never change and are shared."""
        found = super().__deepcopy__(memo)
        assert isinstance(found, OnnxModule)
        vars(found).update(_known(self))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """As graph modules are pickled, and read into this class again."""
        function, arguments = super().__reduce__()
        return _again, (function, arguments, type(self).__name__, _known(self))


def _known(model: fx.GraphModule) -> dict[str, object]:
    return {name: vars(model)[name] for name in _KNOWN if name in vars(model)}


def _again(
    make: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    name: str,
    known: Mapping[str, object],
) -> OnnxModule:
    """What was pickled."""
    found = make(*arguments)
    model = OnnxModule(found, found.graph, name)
    vars(model).update(known)
    return model
