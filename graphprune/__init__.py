"""graphprune: a smaller dense model whose output equals the masked original."""

from graphprune.api import rebuild
from graphprune.graph import ChannelGraph, trace
from graphprune.mask import mask
from graphprune.plan import Plan
from graphprune.verify import verify

__all__ = ["ChannelGraph", "Plan", "mask", "rebuild", "trace", "verify"]
