"""What a node shows of a long training run while it works."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..training.plot import SIZE, plot, under
from .preview import watching_page

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Report:
    """What a node shows when its run is over, filled in meanwhile: lines of text, and the losses as a picture."""

    lines: list[str] = field(default_factory=list)
    picture: Image.Image | None = None

    def say(self, line: str, path: Path) -> None:
        """Add a line, and write it to the log with the name of the file that is made."""
        log.info("%s: %s", path.name, line)
        self.lines.append(line)

    def begin(self, path: Path, trained: int, needed: float) -> None:
        """Say what will be trained, on the node too, before it begins. needed: memory in bytes."""
        size, memory = f"{trained / 1e6:.1f} million numbers", f"{needed / 1e9:.2f} GB of memory"
        self.say(f"{size} learn in about {memory} besides the models", path)
        page = watching_page()
        if page is not None:
            page.say(self.lines[-1])

    def finished(self, path: Path) -> None:
        """Say nothing but that there was nothing to do."""
        self.lines.clear()
        self.say(f"trained with these settings already: {path}", path)

    def written(self, path: Path) -> None:
        """Say where the file is that was made."""
        self.say(f"written: {path}, {path.stat().st_size / 1e6:.1f} MB", path)

    def shown(self) -> dict[str, Any]:
        """The result of the node for the page. In a script nobody looks at pictures, and none is written."""
        result: dict[str, Any] = {"text": list(self.lines)}
        if self.picture is not None and get_executing_context() is not None:
            where = folder_paths.get_save_image_path("latentmotion_losses", folder_paths.get_temp_directory())
            folder, name, number, subfolder, _ = where
            file = f"{name}_{number:05}_.png"
            self.picture.save(Path(folder) / file)
            result["images"] = [{"filename": file, "subfolder": subfolder, "type": "temp"}]
        return result


class TrainingProgress:
    """Called after every step: the host's progress bar, the losses as the node's preview, and a line in the log.

    losses: the list the run adds to. report: gets the last picture and line. `every_s`: seconds between two pictures.
    strip: what was drawn last with what is being trained, shown under the losses.
    """

    strip: Image.Image | None = None

    def __init__(self, path: Path, total: int, losses: list[float], report: Report, every_s: float = 2.0) -> None:
        self.path, self.losses, self.report, self.every_s = path, losses, report, every_s
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
            self.report.picture = under(plot(self.losses, total, title), self.strip)
            preview = ("JPEG", self.report.picture, max(SIZE))
            if step == total:
                self.report.say(title, self.path)
            else:
                log.info("%s: %s", self.path.name, title)
        self.bar.update_absolute(step, total, preview)

    def _title(self, step: int, total: int, now: float) -> str:
        recent = self.losses[-max(1, min(50, step // 4)) :]
        title = f"step {step} of {total}, loss {sum(recent) / len(recent):.4f}"
        begun, at = self.first
        if step == at or step == total:
            return title
        left = (now - begun) / (step - at) * (total - step)
        return f"{title}, {left / 60:.0f} min left" if left >= 90 else f"{title}, {left:.0f} s left"
