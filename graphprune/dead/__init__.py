"""Which channels of a model do nothing, given its weights."""

from graphprune.dead.merging import agree
from graphprune.dead.passes import Pass
from graphprune.dead.search import Search

__all__ = ["Pass", "Search", "agree"]
