"""Overlapping tiles of a frame, and the weights that make one picture of them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A rectangle of a frame, in latent pixels, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, frames: Tensor, scale: int = 1) -> Tensor:
        """Shapes: frames (..., h, w), `scale` pixels per latent pixel -> (..., h of the tile, w of the tile)."""
        rows = slice(self.top * scale, self.bottom * scale)
        return frames[..., rows, self.left * scale : self.right * scale]


def tiles(height: int, width: int, size: int, overlap: int) -> Iterator[Tile]:
    """Tiles of at most `size` latent pixels a side that cover a frame, neighbours sharing at least `overlap`.

    Those at the right and lower edge are moved inwards, so that no tile is a narrow strip.
    """
    for top, bottom in _spans(height, size, overlap):
        for left, right in _spans(width, size, overlap):
            yield Tile(top, bottom, left, right)


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    if length <= size:
        return [(0, length)]
    starts = [*range(0, length - size, size - overlap), length - size]
    return [(start, start + size) for start in starts]


def feather(tile: Tile, height: int, width: int, overlap: int, scale: int) -> Tensor:
    """How much each pixel of a tile counts: rising linearly over the overlap from every edge inside the frame.

    Shapes: -> (h of the tile * scale, w of the tile * scale), above 0 everywhere. To be divided by the sum over tiles.
    """
    rows = _ramp(tile.bottom - tile.top, tile.top > 0, tile.bottom < height, overlap, scale)
    columns = _ramp(tile.right - tile.left, tile.left > 0, tile.right < width, overlap, scale)
    return rows[:, None] * columns


def _ramp(length: int, at_start: bool, at_end: bool, overlap: int, scale: int) -> Tensor:
    steps = overlap * scale
    weight = torch.ones(length * scale)
    rise = (torch.arange(steps) + 0.5) / steps
    if at_start:
        weight[:steps] *= rise
    if at_end:
        weight[-steps:] *= rise.flip(0)
    return weight
