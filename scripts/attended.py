"""Run a Python script that ends when the process that started it has ended, however that came about.

    python scripts/attended.py SCRIPT [ARGUMENT ...]

Standard input must be a pipe that the other process holds open and never writes to: the system closes it with it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from pathlib import Path


def end_with_the_other_side() -> None:
    """Wait until standard input is closed, then end this process."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> None:
    script, own = argv[0], str(Path(__file__).resolve().parent)
    sys.argv = argv
    sys.path[:] = [str(Path(script).parent), *(folder for folder in sys.path if folder != own)]
    threading.Thread(target=end_with_the_other_side, daemon=True).start()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
