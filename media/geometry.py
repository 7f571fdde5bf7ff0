"""Turning and resizing pictures; kornia computes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Fit(str, Enum):
    """How a picture gets into a frame of another shape."""

    CROP = "crop"
    PAD = "pad"
    STRETCH = "stretch"


@dataclass(frozen=True)
class Frame:
    """Height and width a picture gets; 0 for one of them keeps the proportions, 0 for both keeps the size."""

    height: int = 0
    width: int = 0
    fit: Fit = Fit.CROP

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what a picture of this height and width becomes."""
        if self.height and self.width:
            return self.height, self.width
        if self.height:
            return self.height, max(1, round(width * self.height / height))
        if self.width:
            return max(1, round(height * self.width / width)), self.width
        return height, width


def turn(pictures: Tensor, quarters: int) -> Tensor:
    """Turn counter-clockwise by quarters of a circle. Shapes: (n, h, w, c) -> (n, h, w, c) or (n, w, h, c)."""
    return torch.rot90(pictures, quarters, dims=(1, 2)) if quarters % 4 else pictures


def fit(pictures: Tensor, frame: Frame, natural: tuple[int, int] | None = None) -> Tensor:
    """Resize with antialiasing; crop cuts what hangs over at the middle, pad adds black, stretch does neither.

    Shapes: (n, h, w, 3) in 0..1 -> (n, *frame.size(h, w), 3) in 0..1. `natural` is the height and width that the
    pictures have on the screen, where their pixels are not square.
    """
    height, width = natural or tuple(pictures.shape[1:3])
    target = frame.size(height, width)
    if target == tuple(pictures.shape[1:3]) and (height, width) == target:
        return pictures
    from kornia.geometry.transform import resize  # seconds to import, and few clips need it

    scales = (target[0] / height, target[1] / width)
    scale = {Fit.CROP: max(scales), Fit.PAD: min(scales)}.get(frame.fit)
    inner = target if scale is None else (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = resize(pictures.movedim(3, 1), inner, interpolation="bicubic", align_corners=False, antialias=True)
    resized = resized.clamp(0.0, 1.0)
    if inner != target:
        resized = _centre(resized, target)
    return resized.movedim(1, 3).contiguous()


def _centre(pictures: Tensor, target: tuple[int, int]) -> Tensor:
    """Cut or pad with black to the target, what is there in the middle. Shapes: (n, c, h, w)."""
    spare = [target[i] - pictures.shape[2 + i] for i in (0, 1)]
    (top, bottom), (left, right) = ((s // 2, s - s // 2) for s in spare)
    return torch.nn.functional.pad(pictures, (left, right, top, bottom))
