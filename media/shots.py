"""Where one shot of a film ends and the next begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .clip import Clip

CELLS, BINS, SIDE = 3, 8, 48
THRESHOLD, SHORTEST = 0.3, 8


def shots(clip: Clip, threshold: float = THRESHOLD, shortest: int = SHORTEST,
          on_frame: Callable[[int], None] | None = None) -> tuple[int, ...]:  # fmt: skip
    """Frames of each shot, in order; together they are those of the clip.

    A shot ends where the colours change at once and stay changed: the last two frames differ by more than `threshold`
    from the next one, and the last one from the next two, so that a flash is no cut. Fades are not found.
    Units: threshold 0..1, see `apart`; a shot has at least `shortest` frames. Memory: a chunk, and 432 bytes a frame.
    """
    signs = signatures(clip, on_frame)
    if len(signs) < 2:
        return (clip.frames,)
    change = apart(signs[:-1], signs[1:])
    across = apart(signs[:-2], signs[2:])
    change[:-1] = torch.minimum(change[:-1], across)
    change[1:] = torch.minimum(change[1:], across)
    starts = [0]
    for frame in (change > threshold).nonzero()[:, 0].add(1).tolist():
        if frame - starts[-1] >= shortest and clip.frames - frame >= shortest:
            starts.append(frame)
    return tuple(end - start for start, end in zip(starts, [*starts[1:], clip.frames], strict=True))


def signatures(clip: Clip, on_frame: Callable[[int], None] | None = None) -> Tensor:
    """Colours of every frame, coarsely and by place: (frames, cells, 3 channels, bins), float16.

    Bins have soft edges, so that a slow change of brightness moves the shares of neighbouring bins slowly.
    """
    parts, done = [], 0
    for chunk in clip.chunks():
        small = functional.adaptive_avg_pool2d(chunk.movedim(3, 1), SIDE)
        cells = small.unflatten(3, (CELLS, -1)).unflatten(2, (CELLS, -1)).movedim(3, 4)  # n, 3, CELLS, CELLS, h, w
        values = cells.flatten(4).flatten(2, 3).transpose(1, 2)[..., None] * (BINS - 1)
        shares = (1 - (values - torch.arange(BINS)).abs()).clamp(min=0)
        parts.append(shares.mean(3).half())
        done += len(chunk)
        if on_frame:
            on_frame(done)
    return torch.cat(parts) if parts else torch.empty(0, CELLS**2, 3, BINS)


def apart(a: Tensor, b: Tensor) -> Tensor:
    """How much signatures differ: 0 the same colours in every cell, 1 none in common. Shapes: (n, ...) both -> (n,)."""
    return (a.float() - b.float()).abs().sum(3).mean((1, 2)) / 2
