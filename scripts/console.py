"""What the commands say: plain lines, one moving line on a terminal, and errors that tell what to do."""

from __future__ import annotations

import sys
import time
from pathlib import Path


class SetupError(Exception):
    """Set-up cannot go on. The message says what failed and what the person can do about it."""


def say(text: str) -> None:
    """Print one line at once, so that it also shows through a pipe."""
    print(text, flush=True)


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log file, indented, for the end of an error message."""
    if not log.is_file():
        return "    (no log was written)"
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line[:240]}" for line in text[-lines:])


def bar(done: float, total: float, width: int = 28) -> str:
    """A text progress bar for `done` of `total`."""
    filled = round(width * min(max(done / total, 0.0), 1.0)) if total else 0
    return f"[{'#' * filled}{'.' * (width - filled)}]"


class Progress:
    """One line that keeps changing on a terminal; through a pipe, a new line at most every `every` seconds."""

    def __init__(self, every: float = 20.0) -> None:
        self.begun = time.monotonic()
        self.every = every
        self.terminal = sys.stdout.isatty()
        self._last_line = self.begun
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line by `text` and the seconds since the start."""
        seconds = time.monotonic() - self.begun
        line = f"  {text}  {seconds:.0f} s"[:118]
        if self.terminal:
            print("\r" + line.ljust(self._width), end="", flush=True)
            self._width = len(line)
        elif time.monotonic() - self._last_line >= self.every:
            self._last_line = time.monotonic()
            say(line)

    def end(self, text: str) -> float:
        """Clear the line, print `text` with the seconds it took, and return them."""
        seconds = time.monotonic() - self.begun
        if self.terminal and self._width:
            print("\r" + " " * self._width + "\r", end="")
        say(f"  {text} ({seconds:.0f} s)")
        return seconds
