"""Run a function in a process of its own, so that a crash or a hang costs one line of a table."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def isolated(function: Callable[..., dict[str, Any]], *args: Any, timeout: float) -> dict[str, Any]:
    """Call a function in a forked process.

    Returns:
        What it returned, or ``{"status": ..., "reason": ...}`` when it raised, died or took
        longer than ``timeout`` seconds.
    """
    context = multiprocessing.get_context("fork")  # the parent has imported torch already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            found: dict[str, Any] = receiver.recv()
            return found
        return {"status": "timeout", "reason": f"longer than {timeout:.0f} s"}
    except EOFError:
        process.join()
        return {"status": "died", "reason": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _call(sender: Connection, function: Callable[..., dict[str, Any]], args: Any) -> None:
    try:
        sender.send({"status": "ok", **function(*args)})
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        reason = f"{type(error).__name__}: {error} ({where})"
        sender.send({"status": "failed", "reason": reason})
    finally:
        sender.close()
