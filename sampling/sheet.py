"""Arithmetic of a sheet of pictures: which frames are on it, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass


def spread(frames: int, most: int) -> list[int]:
    """At most `most` of `frames` frames, evenly spread from the first to the last."""
    if frames <= most:
        return list(range(frames))
    return [round(number * (frames - 1) / (most - 1)) for number in range(most)]


@dataclass(frozen=True)
class Sheet:
    """`count` pictures row by row, about as many rows as columns."""

    count: int

    @property
    def columns(self) -> int:
        return math.ceil(math.sqrt(self.count))

    @property
    def rows(self) -> int:
        return math.ceil(self.count / self.columns)

    def cell(self, number: int) -> tuple[int, int]:
        """Column and row of a picture."""
        return number % self.columns, number // self.columns
