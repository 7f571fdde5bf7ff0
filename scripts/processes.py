"""Processes that end together: this one clears up when it is told to end, and so does what it has started."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PATIENCE = 20.0
"""Seconds that a process gets to clear up."""


def end_as_by_exit() -> None:
    """From here on SIGTERM and a closed terminal end this process as sys.exit does, through every `finally`."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def run_to_its_end(command: Sequence[str], patience: float = PATIENCE, **options: Any) -> int:
    """The exit code of `command`. When this process is told to end, it waits for the command to clear up first.

    Ctrl-C on a terminal reaches the command by itself; everything else is passed on to it as Ctrl-C.
    """
    process = subprocess.Popen(command, **options)
    try:
        return process.wait()
    except BaseException as reason:
        if not (isinstance(reason, KeyboardInterrupt) and sys.stdin is not None and sys.stdin.isatty()):
            with contextlib.suppress(OSError, ValueError):
                process.send_signal(signal.SIGINT)
        try:
            process.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise
