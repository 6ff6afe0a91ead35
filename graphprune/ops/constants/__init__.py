"""What a model computes whatever its input: constant channels and where they lie."""

from graphprune.ops.constants.fact import FACTS, Fact, register_fact

__all__ = ["FACTS", "Fact", "register_fact"]
