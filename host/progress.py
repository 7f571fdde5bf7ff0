"""What a node shows of a long training run while it works."""

from __future__ import annotations

import logging
import time

import comfy.utils
from PIL import Image

from ..training.plot import SIZE, plot, under

log = logging.getLogger(__name__)


class TrainingProgress:
    """Called after every step: the host's progress bar, the losses as the node's preview, and a line in the log.

    losses: the list the run adds to. `every_s`: seconds between two pictures. strip: what was drawn last with what
    is being trained, shown under the losses.
    """

    strip: Image.Image | None = None

    def __init__(self, name: str, total: int, losses: list[float], every_s: float = 2.0) -> None:
        self.name, self.losses, self.every_s = name, losses, every_s
        self.bar = comfy.utils.ProgressBar(total)
        self.first: tuple[float, int] | None = None
        self.drawn = float("-inf")

    def __call__(self, step: int, total: int, loss: float) -> None:
        now = time.monotonic()
        self.first = self.first or (now, step)
        preview = None
        if now - self.drawn >= self.every_s or step == total:
            self.drawn = now
            title = self._title(step, total, now)
            log.info("%s: %s", self.name, title)
            preview = ("JPEG", under(plot(self.losses, total, title), self.strip), max(SIZE))
        self.bar.update_absolute(step, total, preview)

    def _title(self, step: int, total: int, now: float) -> str:
        recent = self.losses[-max(1, min(50, step // 4)) :]
        title = f"step {step} of {total}, loss {sum(recent) / len(recent):.4f}"
        begun, at = self.first
        if step == at or step == total:
            return title
        left = (now - begun) / (step - at) * (total - step)
        return f"{title}, {left / 60:.0f} min left" if left >= 90 else f"{title}, {left:.0f} s left"
