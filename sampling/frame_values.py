"""A setting that may change from frame to frame, and from place to place within a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

LAST_FRAME = 100_000


class FrameValueError(ValueError):
    """Values per frame cannot be read."""


@dataclass(frozen=True, eq=False)
class FrameValues:
    """A number for the whole clip, times an optional map per frame.

    maps: (F, 1, H, W); one frame stands for all, and the last one is held when the clip is longer.
    """

    number: float = 1.0
    maps: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        return self.number == 0.0 or (self.maps is not None and not bool(self.maps.any()))

    def at(self, frames: Sequence[int], clips: int) -> float | Tensor:
        """Values for these frames of the clip, repeated for every clip in the call.

        Returns a number, or a tensor (clips * len(frames), 1, H, W).
        """
        if self.maps is None:
            return self.number
        last = self.maps.shape[0] - 1
        index = torch.tensor([min(frame, last) for frame in frames], device=self.maps.device)
        return (self.maps[index] * self.number).repeat(clips, 1, 1, 1)

    def __deepcopy__(self, memo: dict) -> FrameValues:
        """Immutable, so copies of a model's options share it."""
        return self


def frame_values(number: float, per_frame: Tensor | Sequence[float] | float | None) -> FrameValues:
    """Build from a number and what a socket may bring: nothing, a number, a list of numbers, or masks (F, H, W).

    Raises FrameValueError for an empty list, a mask of another rank, and what is no ordinary number; ValueError where
    `number` is none.
    """
    if not math.isfinite(number):
        raise ValueError(f"{number} is no ordinary number. Write one such as 1.0.")
    if per_frame is None:
        return FrameValues(float(number))
    if isinstance(per_frame, Tensor):
        maps = per_frame if per_frame.ndim > 2 else per_frame[None]
        if maps.ndim != 3 or not maps.numel():
            raise FrameValueError(f"Masks of shape (frames, height, width) are needed, not {tuple(per_frame.shape)}.")
        maps = maps[:, None].float().clone()
    else:
        values = list(per_frame) if isinstance(per_frame, Sequence) else [per_frame]
        if not values:
            raise FrameValueError("The list is empty. Give at least one number, or connect nothing.")
        strange = [value for value in values if not isinstance(value, Real)]
        if strange:
            raise FrameValueError(f"The list holds {strange[0]!r}, where every value must be a number.")
        maps = torch.tensor(values)[:, None, None, None]
    if not torch.isfinite(maps).all():
        raise FrameValueError("The values hold NaN or infinite numbers; every one must be an ordinary number.")
    return FrameValues(float(number), maps)


def parse_frame_values(text: str) -> list[float]:
    """Read "0.2, 0.5, 1" (one number per frame) or "0: 0.2, 15: 1" (keyframes, linear between).

    Raises FrameValueError naming the part that cannot be read.
    """
    parts = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    pairs = []
    for part in parts:
        try:
            frame, value = part.split(":") if ":" in text else ("0", part)
            pairs.append((int(frame), float(value)))
        except ValueError:
            raise FrameValueError(
                f'"{part}" in "{text}" cannot be read. Write numbers such as 0.2, 0.5, 1 or keyframes such as '
                "0: 0.2, 15: 1."
            ) from None
    return _between(sorted(pairs)) if ":" in text else [value for _, value in pairs]


def _between(keys: list[tuple[int, float]]) -> list[float]:
    if keys[0][0] < 0:
        raise FrameValueError(f"Frame {keys[0][0]} is before the first frame; frames count from 0.")
    if keys[-1][0] > LAST_FRAME:
        raise FrameValueError(f"Frame {keys[-1][0]} is beyond the longest clip of {LAST_FRAME} frames.")
    values = [keys[0][1]] * (keys[0][0] + 1)
    for (a, low), (b, high) in zip(keys, keys[1:], strict=False):
        if a == b:
            raise FrameValueError(f"Frame {a} has two values. Give it one.")
        values += [low + (high - low) * (frame - a) / (b - a) for frame in range(a + 1, b + 1)]
    return values
