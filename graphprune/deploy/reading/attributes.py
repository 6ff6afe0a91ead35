"""Attributes of a node: what no reader of its operator asks for must mean nothing.

Readers declare what they read by reading it. All else has to be what the schema of ONNX takes when
it is absent, so that a setting which nobody thought of is refused instead of overlooked.
"""

from __future__ import annotations

from typing import Any

_OF_NO_EFFECT = {
    "Cast": {"saturate", "round_mode"},  # for types of eight bits, which are refused
    "Conv": {"kernel_shape"},  # the weight has it
    "ConvTranspose": {"kernel_shape"},
    "Dropout": {"ratio", "seed"},  # of training, which is refused
    "MaxPool": {"storage_order"},  # of indices, which are refused
    "Split": {"num_outputs"},  # as many as there are names
}


class Attributes(dict[str, Any]):
    """Attributes by name, which remember what was asked for."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The value."""
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or what it is when absent."""
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        """Whether it is there."""
        self.asked.add(str(name))
        return super().__contains__(name)

    def overlooked(self, op: str, opset: int) -> str:
        """What says something that nobody asked for; empty where nothing does."""
        from onnx import defs, helper

        known = defs.get_schema(op, opset).attributes if defs.has(op) else {}
        for name, value in self.items():
            if name in self.asked or name in _OF_NO_EFFECT.get(op, ()):
                continue
            usual = known[name].default_value if name in known else None
            if usual is None or not usual.name or helper.get_attribute_value(usual) != value:
                shown = value.decode(errors="replace") if isinstance(value, bytes) else value
                return f"{name}={shown!r}, which cannot be read here"
        return ""
