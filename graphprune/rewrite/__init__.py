"""A plan executed by slicing."""
