"""What a run learns from in a few numbers, nearly the same where another machine computes it in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

NUMBERS = 8
LENGTH = 8191  # a prime: places that are folded onto each other are of other lines and colours
CLOSE = 0.005
LEAST = 1e-6  # size that black pictures count as


class Likeness:
    """Random projections of rows of numbers, over their length, and how large the numbers are: other rows, or the same
    in another order or a hundredth larger, are told apart; rounding is not, nor in what parts the rows come."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        pattern = self._random(LENGTH, NUMBERS)
        self._pattern = pattern - pattern.mean(0)
        self._sums, self._square, self._count = torch.zeros(NUMBERS, dtype=torch.float64), 0.0, 0

    def add(self, rows: Tensor) -> None:
        """Shapes: (n, ...)."""
        for row in rows.detach().cpu().flatten(1):
            row = row.double()
            folded = nn.functional.pad(row, (0, -len(row) % LENGTH)).view(-1, LENGTH).sum(0)
            self._sums += self._random(NUMBERS) * (folded @ self._pattern)
            self._square += float(row.square().sum())
            self._count += len(row)

    def numbers(self) -> tuple[float, ...]:
        count = max(self._count, 1)
        size = max((self._square / count) ** 0.5, LEAST)  # root mean square: a hundredth is 2 CLOSE in its logarithm
        return tuple(round(number, 6) for number in [*(self._sums / (size * count**0.5)).tolist(), math.log(size)])

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether numbers of two likenesses are of the same rows."""
    return len(one) == len(other) and all(abs(a - b) <= CLOSE for a, b in zip(one, other, strict=True))
