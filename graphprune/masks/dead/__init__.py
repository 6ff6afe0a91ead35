"""Which channels of a model do nothing, given its weights."""

from graphprune.masks.dead.merging import agree
from graphprune.masks.dead.passes import Pass
from graphprune.masks.dead.search import Search

__all__ = ["Pass", "Search", "agree"]
