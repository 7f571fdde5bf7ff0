"""GroupNorm whose statistics run over all frames of a clip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Affine = Callable[[nn.GroupNorm, Tensor], tuple[Tensor, Tensor]]


def plain_affine(norm: nn.GroupNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm in the type and on the device of `like`."""
    return tuple(p.to(device=like.device, dtype=like.dtype) for p in (norm.weight, norm.bias))


def joint_group_norm(norm: nn.GroupNorm, x: Tensor, frames: int, affine: Affine = plain_affine) -> Tensor:
    """Apply a GroupNorm as if the frames of each clip were one image.

    `affine` fetches weight and bias; a host that keeps weights elsewhere brings its own.

    Shapes: x (v f, c, h, w) -> the same. No permuted copy is made: mean and variance are taken through a view.
    Source: plain GroupNorm on (v, c, f, h, w), as AnimateDiff v1's ResBlocks and Tune-A-Video compute it.
    """
    n, c, h, w = x.shape
    grouped = x.reshape(n // frames, frames, norm.num_groups, -1)
    statistics = grouped.float() if x.dtype in (torch.float16, torch.bfloat16) else grouped
    variance, mean = torch.var_mean(statistics, dim=(1, 3), correction=0, keepdim=True)
    gain = torch.rsqrt(variance + norm.eps)
    normed = ((statistics - mean) * gain).to(x.dtype).reshape(n, c, h, w)
    weight, bias = affine(norm, x)
    return torch.addcmul(bias[:, None, None], normed, weight[:, None, None])
