"""What a model computes whatever its input: constant channels and where they lie."""

from graphprune.constants.fact import FACTS, Fact, register_fact
from graphprune.constants.interpret import Interpreter, real_tensors

__all__ = ["FACTS", "Fact", "Interpreter", "real_tensors", "register_fact"]
