"""Small awkward networks, each a few lines, named after what is awkward.

Every entry says how many channels can be removed, by the reasoning written next to it: the
number of units, not of positions. ``None`` stands for "any number, as long as it is sound".
"""

from zoo.registry import ZOO, Entry, randomise

from zoo import branches, convolutions, layers, movement, parameters, sizes, structure  # isort: skip

__all__ = ["ZOO", "Entry", "branches", "convolutions", "layers", "movement", "parameters",
           "randomise", "sizes", "structure"]  # fmt: skip
