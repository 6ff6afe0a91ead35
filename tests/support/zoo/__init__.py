"""Small awkward networks, each a few lines, named after what is awkward.

Every entry says how many channels can be removed, by the reasoning written next to it: the
number of units, not of positions. ``None`` stands for "any number, as long as it is sound".
"""

from support.zoo.registry import ZOO, Entry, randomise

from support.zoo import attention, branches, calls, convolutions, experts, features  # isort: skip
from support.zoo import gathering, heads, image_attention  # isort: skip
from support.zoo import kernels, layers, movement, norms, packed, parameters  # isort: skip
from support.zoo import recurrent, sequences, sizes, streams, structure, torch_attention  # isort: skip
from support.zoo import transformers, windows  # isort: skip

__all__ = ["ZOO", "Entry", "attention", "branches", "calls", "convolutions", "experts", "features",
           "gathering", "heads", "image_attention", "kernels", "layers", "movement", "norms",
           "packed", "parameters", "randomise", "recurrent", "sequences", "sizes", "streams",
           "structure", "torch_attention", "transformers", "windows"]  # fmt: skip
