"""A plan executed by slicing."""

from graphprune.rewrite.shrink import shrink

__all__ = ["shrink"]
