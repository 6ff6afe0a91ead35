"""The docstrings' ``Example:`` under the title that the reader of docstrings knows as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames a section."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Every object as it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
