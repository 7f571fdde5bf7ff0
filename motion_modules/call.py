"""What one denoising call tells the layers of a video model; the layers themselves hold weights only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .norm import Affine, plain_affine

SLAB_BYTES_CPU = 32 * 1024**2
SLAB_BYTES_GPU = 256 * 1024**2


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full softmax attention over the second last axis.

    Shapes: q, k, v (n, heads, f, d) with any strides -> (n, heads, f, d).
    """
    return functional.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True, eq=False)
class MotionCall:
    """One call of the network on `videos * frames` images.

    frames: images per clip; the batch is `(v f) c h w`, clip after clip.
    positions: (frames,) place of every frame on the module's time axis, in frames.
    strength: how much of the module's output is added; a number, or (v f, 1, H, W) on any grid.
    scale: factor on the keys of temporal attention; a number, or (v f, 1, H, W) on any grid.
    slab_bytes: ceiling on one temporary; the work is cut over pixel positions to stay under it.
    attention: softmax attention on (n, heads, f, d) tensors.
    affine: fetches the weight and bias of a norm that is computed by hand.
    """

    frames: int
    positions: Tensor
    strength: float | Tensor = 1.0
    scale: float | Tensor = 1.0
    slab_bytes: int = SLAB_BYTES_CPU
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = scaled_dot_product
    affine: Affine = plain_affine


def on_grid(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Bring a per-frame map to the grid and type of a feature map; numbers pass through.

    Shapes: value (n, 1, H, W), like (n, c, h, w) -> (n, 1, h, w).
    """
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=like.device, dtype=torch.float32)  # already there, but for maps of other callers
    return resized(value, tuple(like.shape[-2:])).to(like.dtype)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps on another grid: smaller ones are means, so that nothing small gets lost, larger ones are bilinear.

    Shapes: maps (n, 1, H, W) -> (n, 1, *size).
    """
    if maps.shape[-2:] == size:
        return maps
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return functional.interpolate(maps, size=size, mode="area")
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
