"""How overlapping windows agree on a frame: a weighted mean, the weights depending on the place in the window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor


class FuseMethod(str, Enum):
    """Weights over a window, in the words of the field."""

    PYRAMID = "pyramid"
    FLAT = "flat"
    RELATIVE = "relative"
    OVERLAP_LINEAR = "overlap-linear"


def window_weights(
    method: FuseMethod, window: Sequence[int], frames: int, overlap: int, loops: bool = False
) -> list[float]:
    """Positive weight of each frame of a window; only their ratios between windows matter.

    `frames` is the length of the clip: overlap-linear does not fade where the window meets an end of the clip. With
    `loops` the windows run on from the last frame into the first, and there is no such end.
    """
    fade = min(overlap, len(window))
    fade_in = fade if loops or window[0] > 0 else 0
    fade_out = fade if loops or window[-1] < frames - 1 else 0
    return WEIGHTS[method](len(window), fade_in, fade_out)


def _pyramid(n: int, fade_in: int, fade_out: int) -> list[float]:
    return [float(min(i + 1, n - i)) for i in range(n)]


def _flat(n: int, fade_in: int, fade_out: int) -> list[float]:
    return [1.0] * n


def _relative(n: int, fade_in: int, fade_out: int) -> list[float]:
    half = (n - 1) / 2
    return [max(0.01, 1.0 - abs(i - half) / (half + 0.005)) for i in range(n)]


def _overlap_linear(n: int, fade_in: int, fade_out: int) -> list[float]:
    return [min(1.0, (i + 1) / (fade_in + 1), (n - i) / (fade_out + 1)) for i in range(n)]


WEIGHTS: dict[FuseMethod, Callable[[int, int, int], list[float]]] = {
    FuseMethod.PYRAMID: _pyramid,
    FuseMethod.FLAT: _flat,
    FuseMethod.RELATIVE: _relative,
    FuseMethod.OVERLAP_LINEAR: _overlap_linear,
}


class Fusion:
    """Adds up windows of one tensor and returns their weighted mean, one frame's weights summing to one.

    Shapes: the clip has `frames` entries on axis `axis`; each window adds a tensor with as many entries as it has.
    loops: whether the windows run on from the last frame into the first.
    """

    def __init__(self, like: Tensor, axis: int, method: FuseMethod, overlap: int, loops: bool = False) -> None:
        self.axis, self.method, self.overlap, self.loops = axis, method, overlap, loops
        self.frames = like.shape[axis]
        self.total = torch.zeros_like(like)
        self.weight = torch.zeros(self.frames, dtype=torch.float64)

    def add(self, window: Sequence[int], value: Tensor) -> None:
        found = window_weights(self.method, window, self.frames, self.overlap, self.loops)
        weights = torch.tensor(found, dtype=torch.float64)
        index = torch.tensor(window)
        self.weight.index_add_(0, index, weights)
        self.total.index_add_(self.axis, index.to(value.device), value * self._along(weights, value))

    def mean(self) -> Tensor:
        return self.total / self._along(self.weight, self.total)

    def _along(self, weights: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.ndim
        shape[self.axis] = -1
        return weights.to(device=like.device, dtype=like.dtype).view(shape)
