"""The source files of the package, each parsed once for all tests that read them."""

import ast
import functools


@functools.cache
def tree(path):
    """What a file parses to."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path):
    """All nodes of a file, in the order of ``ast.walk``."""
    return (*ast.walk(tree(path)),)
