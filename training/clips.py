"""Clips to learn from, as latents that are made once, and which part of which clip a batch takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..motion_modules.errors import TrainingError

EMPTY = ""


@dataclass(frozen=True, eq=False)
class Clips:
    """Latents with their captions, and how batches are cut from them.

    latents: per clip (n, c, h, w), float32. captions: one per clip.
    frames, stride: pictures of a training clip, and the distance between two of them in the clip it is cut from.
    drop: share of the captions that are left out, so that the empty caption keeps its meaning.
    """

    latents: tuple[Tensor, ...]
    captions: tuple[str, ...]
    frames: int
    stride: int = 1
    drop: float = 0.1

    def __post_init__(self) -> None:
        needed = span_of(self.frames, self.stride)
        for number, clip in enumerate(self.latents, 1):
            if len(clip) < needed:
                every = f" with a stride of {self.stride}" if self.stride > 1 else ""
                raise TrainingError(
                    f"Clip {number} has {len(clip)} frames, and {self.frames} frames{every} need {needed}. Choose "
                    "fewer frames or a smaller stride, or give longer clips."
                )

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Cut a batch from clips and starts chosen at random.

        Shapes: -> latents (batch * frames, c, h, w), clip after clip, and their captions.
        """
        latents, captions = [], []
        for _ in range(batch):
            number = int(torch.randint(len(self.latents), (), generator=generator))
            clip, span = self.latents[number], span_of(self.frames, self.stride)
            first = int(torch.randint(len(clip) - span + 1, (), generator=generator))
            latents.append(clip[first : first + span : self.stride])
            dropped = float(torch.rand((), generator=generator)) < self.drop
            captions.append(EMPTY if dropped else self.captions[number])
        return torch.cat(latents), captions


def span_of(frames: int, stride: int) -> int:
    """Pictures from the first to the last of `frames` that are `stride` apart."""
    return (frames - 1) * stride + 1


def captions_for(clips: int, text: str) -> tuple[str, ...]:
    """The lines of a text as captions, or its only line for each of the clips. Raises TrainingError."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise TrainingError("The clips have no caption. Write what they show, leaving out the motion to be learned.")
    if len(lines) not in (1, clips):
        raise TrainingError(
            f"There are {clips} clips and {len(lines)} captions. Write one line for each clip, or one for all."
        )
    return tuple(lines * clips if len(lines) == 1 else lines)


def stratified(batch: int, count: int, generator: torch.Generator,
               ranges: Sequence[tuple[float, float]] = ((0.0, 1.0),)) -> Tensor:  # fmt: skip
    """Positions in a table of `count` entries, one in each of `batch` equal parts of it. Shapes: -> (batch,), int64.

    ranges: parts of the table, as shares of it, that stand in a row for the whole of it.
    """
    place = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(ranges)
    number = place.long().clamp(max=len(ranges) - 1)
    first, last = torch.tensor(ranges).T[:, number]
    return ((first + (place - number) * (last - first)) * count).long().clamp(max=count - 1)
