"""The pack's clips in a server's input folder, from which the canvas shows them on the node that loads them."""

from __future__ import annotations

import shutil
from pathlib import Path

CLIPS = Path(__file__).resolve().parent.parent.parent / "demo" / "clips"


def provide_clips(base: Path) -> None:
    """Copy them into a server's base directory. A run would find them without."""
    (base / "input").mkdir(exist_ok=True)
    for clip in CLIPS.glob("*.mp4"):
        shutil.copy(clip, base / "input")
