"""Independent float64 computation of AnimateDiff's motion modules, to judge the pack's own by.

Written from the published description only (section 4.2 of arXiv 2307.04725 and the authors' released layout), in
the plainest form: one formula a line, no slabs, no fused products, no torch.nn layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ATTENTIONS = 2
HEADS = 8
GROUPS = 32


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, both as vectors, in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def wide(value: float | Tensor) -> float | Tensor:
    return value.double() if isinstance(value, Tensor) else value


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, frames: int, eps: float) -> Tensor:
    """GroupNorm of 32 groups with one mean and variance per group over `frames` images (1: each image by itself).

    Shapes: x (v f, c, h, w) -> the same, float64.
    """
    x = x.double()
    n, c, h, w = x.shape
    clips = x.view(n // frames, frames, GROUPS, c // GROUPS, h, w)
    axes = (1, 3, 4, 5)
    centred = clips - clips.mean(axes, keepdim=True)
    normed = centred / (centred.pow(2).mean(axes, keepdim=True) + eps).sqrt()
    return normed.view(n, c, h, w) * weight.double().view(1, c, 1, 1) + bias.double().view(1, c, 1, 1)


def position_table(positions: Tensor, channels: int) -> Tensor:
    """PE[p, 2i] = sin(p / 10000^(2i / C)), PE[p, 2i + 1] = cos of the same. Shapes: (f,) -> (f, C)."""
    table = torch.zeros(len(positions), channels, dtype=torch.float64)
    for row, p in enumerate(positions.double().tolist()):
        for i in range(0, channels, 2):
            angle = p / 10000.0 ** (i / channels)
            table[row, i], table[row, i + 1] = math.sin(angle), math.cos(angle)
    return table


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def self_attention(y: Tensor, w: Mapping[str, Tensor], name: str, key_scale: float | Tensor) -> Tensor:
    """Shapes: y (v, d, f, c), key_scale a number or (v, d, f, 1) -> (v, d, f, c)."""
    v, d, f, c = y.shape
    q = y @ w[f"{name}.to_q.weight"].T
    k = y @ w[f"{name}.to_k.weight"].T * key_scale
    u = y @ w[f"{name}.to_v.weight"].T
    q, k, u = (t.view(v, d, f, HEADS, c // HEADS) for t in (q, k, u))
    logits = torch.einsum("vdqhc,vdkhc->vdhqk", q, k) / math.sqrt(c // HEADS)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    mixed = torch.einsum("vdhqk,vdkhc->vdqhc", weights, u).reshape(v, d, f, c)
    return mixed @ w[f"{name}.to_out.0.weight"].T + w[f"{name}.to_out.0.bias"]


def feed_forward(y: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    hidden = y @ w["ff.net.0.proj.weight"].T + w["ff.net.0.proj.bias"]
    value, gate = hidden.chunk(2, dim=-1)
    gelu = 0.5 * gate * (1.0 + torch.erf(gate / math.sqrt(2.0)))
    return (value * gelu) @ w["ff.net.2.weight"].T + w["ff.net.2.bias"]


def temporal_transformer(
    x: Tensor,
    weights: Mapping[str, Tensor],
    frames: int,
    *,
    joint_norm: bool = False,
    positions: Tensor | None = None,
    strength: float | Tensor = 1.0,
    key_scale: float | Tensor = 1.0,
) -> Tensor:
    """x + strength * motion(x).

    Shapes: x (v f, c, h, w) -> the same, float64; strength, key_scale numbers or (v f, 1, h, w). `weights` under the
    published names, without what stands before `norm.weight`.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    x, strength, key_scale = x.double(), wide(strength), wide(key_scale)
    n, c, h, wd = x.shape
    positions = torch.arange(frames) if positions is None else positions

    def by_place(t: Tensor) -> Tensor:
        """(v f, c, h, w) -> (v, h w, f, c)."""
        return t.view(n // frames, frames, t.shape[1], h * wd).permute(0, 3, 1, 2)

    y = group_norm(x, w["norm.weight"], w["norm.bias"], frames if joint_norm else 1, 1e-6)
    y = by_place(y) @ w["proj_in.weight"].T + w["proj_in.bias"]
    key_scale = by_place(key_scale) if isinstance(key_scale, Tensor) else key_scale
    block = {k.removeprefix("transformer_blocks.0."): t for k, t in w.items() if k.startswith("transformer_blocks.0.")}
    table = position_table(positions, c)
    for i in range(ATTENTIONS):
        normed = layer_norm(y, block[f"norms.{i}.weight"], block[f"norms.{i}.bias"])
        y = y + self_attention(normed + table, block, f"attention_blocks.{i}", key_scale)
    y = y + feed_forward(layer_norm(y, block["ff_norm.weight"], block["ff_norm.bias"]), block)
    motion = y @ w["proj_out.weight"].T + w["proj_out.bias"]
    return x + strength * motion.permute(0, 2, 3, 1).reshape(n, c, h, wd)


def resize(maps: Tensor, height: int, width: int) -> Tensor:
    """Linear interpolation between pixel centres, edges held. Shapes: (n, 1, H, W) -> (n, 1, height, width)."""

    def weights_of(old: int, new: int) -> Tensor:
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            place = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = int(place)
            high = min(low + 1, old - 1)
            matrix[i, low] += 1.0 - (place - low)
            matrix[i, high] += place - low
        return matrix

    return weights_of(maps.shape[-2], height) @ maps.double() @ weights_of(maps.shape[-1], width).T


def sigmas(linear_in: str, last: float, first: float = 0.00085, steps: int = 1000) -> Tensor:
    """Noise levels of every training step, sqrt((1 - a) / a) with a the product of 1 - beta. Shape (steps,).

    linear_in: "beta" (diffusers' `linear`) or "root" (diffusers' `scaled_linear`: the square root of beta is linear).
    """
    share = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    if linear_in == "beta":
        betas = first + (last - first) * share
    else:
        betas = (math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * share) ** 2
    kept = torch.cumprod(1.0 - betas, 0)
    return ((1.0 - kept) / kept).sqrt()


def random_weights(shapes: Mapping[str, torch.Size], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Seeded weights for these tensors: matrices keep the variance of what they multiply, norms are near one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            made[name] = noise * gain * shape[-1] ** -0.5
        else:
            made[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    return made
