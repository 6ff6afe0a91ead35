"""Ctrl-C at a chosen line."""

import sys


class Interrupt:
    """Raises at the n-th line that runs of some files, and passes over what it raised.

    Args:
        number: of the line.
        counts: whether lines of a file count, by its name.
    """

    def __init__(self, number, counts):
        self.left, self.counts = number, counts

    def __enter__(self):
        sys.settrace(self.call)

    def __exit__(self, *error):
        sys.settrace(None)
        return error[0] is KeyboardInterrupt

    def call(self, frame, event, arg):
        return self.line if self.counts(frame.f_code.co_filename) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line
