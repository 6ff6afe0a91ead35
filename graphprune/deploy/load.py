"""What else a machine does while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_STAT = Path("/proc/stat")


class Load:
    """How many cores other processes used inside ``with``; text when it is over."""

    def __init__(self) -> None:
        self.others: float | None = None

    def __enter__(self) -> Self:
        self.start = time.perf_counter(), time.process_time(), busy_seconds()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        wall, mine, busy = self.start
        now = busy_seconds()
        if busy is None or now is None:
            return
        passed = max(time.perf_counter() - wall, 1e-9)
        self.others = max(0.0, (now - busy - (time.process_time() - mine)) / passed)

    def __str__(self) -> str:
        """As ``other processes used 0.1 of 2 cores``."""
        if self.others is not None:
            return f"other processes used {self.others:.1f} of {os.cpu_count()} cores"
        if hasattr(os, "getloadavg"):
            return f"load {os.getloadavg()[0]:.1f} in the last minute, this process included"
        return "load not known"


def busy_seconds() -> float | None:
    """Seconds that all cores have worked since the machine was started, where it is told."""
    try:
        first = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, soft, *rest = map(int, first[1:])
    except (OSError, ValueError):
        return None
    stolen = rest[0] if rest else 0
    ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    return (user + nice + system + irq + soft + stolen) / ticks
