"""Frames on their way through the layers of a decoder, a piece at a time.

Every function here takes an iterator of pieces and yields pieces; a convolution in time gives its last frame only when
it knows that none follows, so it yields one frame less at first and one more at the end. Zero padding at the ends of
the clip is what leaving out the missing neighbour amounts to. Nothing here holds on to a piece it has passed on: a
hundred of these in a row must need the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from .plan import Statistics

Fetch = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive frames x (n, c, h, w), and what is to be added to them later, frame by frame, on any device."""

    x: Tensor
    skip: tuple[Tensor, ...] = ()


Flow = Iterator[Piece]


def spatial(flow: Flow, layer: Callable[[Tensor], Tensor]) -> Flow:
    """Layers that treat every frame alone."""
    return map(lambda piece: Piece(layer(piece.x)), flow)


def branch(flow: Flow) -> Flow:
    """Keep the frames for the addition at the end of a residual branch."""
    return map(lambda piece: Piece(piece.x, tuple(piece.x)), flow)


def merge(flow: Flow, weight: Callable[[Tensor], Tensor | float]) -> Flow:
    """Close a residual branch: skip + weight * x, written into x, which a convolution has just made."""

    def add(piece: Piece) -> Piece:
        factor = weight(piece.x)
        if isinstance(factor, Tensor) or factor != 1.0:
            piece.x.mul_(factor)
        for frame, skip in zip(piece.x, piece.skip, strict=True):
            frame.add_(skip.to(frame.device))
        return Piece(piece.x)

    return map(add, flow)


def normalise(flow: Flow, norm: nn.GroupNorm, statistics: Statistics, fetch: Fetch) -> Flow:
    """GroupNorm with statistics known beforehand, and SiLU."""
    repeats = norm.num_channels // norm.num_groups

    def apply(piece: Piece) -> Piece:
        known = torch.stack((statistics.mean, statistics.variance)).to(piece.x.device)
        mean, variance = known.repeat_interleave(repeats, dim=1)
        weight, bias = (part.to(mean.dtype) for part in fetch(norm, piece.x))
        # A batch norm with given statistics is this very formula, in one pass and with float32 inside.
        normed = functional.batch_norm(piece.x, mean, variance, weight, bias, training=False, eps=norm.eps)
        return Piece(functional.silu(normed, inplace=True), piece.skip)

    return map(apply, flow)


def convolve(flow: Flow, conv: nn.Conv3d, fetch: Fetch, parked: bool = False) -> Flow:
    """Convolution with kernel (3, 1, 1), stride 1 and one frame of zeros at either end of the clip.

    Each output frame is one matrix product over its three neighbours, whatever the pieces are, so that its value does
    not depend on them. parked: what is to be added later lies in memory for the whole clip anyway.
    """
    taps = _Taps(conv, fetch, parked)
    for ready in map(taps.push, chain(flow, (None,))):
        while ready:
            yield ready.pop()


class _Taps:
    """The last frame that was given out, if any, and the one that waits for its successor."""

    def __init__(self, conv: nn.Conv3d, fetch: Fetch, parked: bool) -> None:
        self.conv, self.fetch, self.parked = conv, fetch, parked
        self.frames: list[Tensor] = []
        self.skips: tuple[Tensor, ...] = ()

    def push(self, piece: Piece | None) -> list[Piece]:
        """Take the next frames, or None for the end of the clip; what can be given out now: one piece or none."""
        if piece is None and not self.frames:
            return []
        x = () if piece is None else (piece.x,)
        window = torch.cat([*(frame[None] for frame in self.frames), *x]).contiguous()  # whatever a device prefers
        skips = self.skips + (() if piece is None else piece.skip)
        first = len(self.frames) // 2
        count = len(window) - first - (piece is not None)
        self.frames = [_own(frame) for frame in window[-2:]]
        self.skips = skips[count:] if self.parked else tuple(_own(skip) for skip in skips[count:])
        if not count:
            return []
        return [Piece(_three_taps(window, first, count, *self.fetch(self.conv, window)), skips[:count])]


def _three_taps(window: Tensor, first: int, count: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Shapes: window (m, c, h, w), frames `first` to `first + count - 1` of it are wanted; weight (o, c, 3, 1, 1)."""
    m, c, h, w = window.shape
    out = window.new_empty(count, len(weight), h * w)
    matrix = weight[..., 0, 0].permute(0, 2, 1).reshape(len(weight), 3 * c)
    rows = window.view(m * c, h * w)
    for number in range(count):
        now = first + number
        start, end = max(now - 1, 0), min(now + 2, m)
        taps = matrix[:, (start - now + 1) * c : (end - now + 1) * c]
        torch.addmm(bias[:, None], taps, rows[start * c : end * c], out=out[number])
    return out.view(count, len(weight), h, w)


def _own(frame: Tensor) -> Tensor:
    """The frame without the piece it was cut from, which would otherwise stay in memory with it."""
    return frame if frame.untyped_storage().nbytes() == frame.nbytes else frame.clone()
