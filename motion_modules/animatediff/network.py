"""The temporal transformer of AnimateDiff, in the published tensor layout.

Source: Guo et al., arXiv 2307.04725, section 4.2; tensor names of the guoyww/AnimateDiff release.
Rows stay `f d c` (frame, pixel position, channel) from the norm to the output projection: only attention looks
across frames, and it takes strided views. Everything but attention is per row, and attention is per position, so
the work is cut into slabs of positions whose temporaries fit the cache; the cut does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..call import MotionCall, on_grid
from ..norm import joint_group_norm
from .spec import MotionSpec

CONVOLUTIONS, WIDTH = 4, 5  # of a block without attention, and the frames each of them sees


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """Sine and cosine table of Vaswani et al. at any real positions.

    Shapes: (f,) -> (f, channels), float32. Even columns are sines, odd columns cosines of the same angle.
    """
    rates = torch.exp(torch.arange(0, channels, 2, device=positions.device) * (-math.log(10000.0) / channels))
    angles = positions.float()[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(len(positions), channels)


class TemporalAttention(nn.Module):
    """Self-attention over the frames of each pixel position."""

    def __init__(self, channels: int, heads: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = ops.Linear(channels, channels, bias=False, **factory)
        self.to_k = ops.Linear(channels, channels, bias=False, **factory)
        self.to_v = ops.Linear(channels, channels, bias=False, **factory)
        self.to_out = nn.ModuleList([ops.Linear(channels, channels, **factory)])

    def forward(self, rows: Tensor, call: MotionCall, scale: float | Tensor) -> Tensor:
        """Shapes: rows (f, d, c), scale a number or (f, d, 1) -> (f, d, c)."""
        f, d, c = rows.shape
        q, k, v = self.to_q(rows), self.to_k(rows), self.to_v(rows)
        if isinstance(scale, Tensor) or scale != 1.0:
            k = k * scale
        q, k, v = (t.view(f, d, self.heads, c // self.heads).permute(1, 2, 0, 3) for t in (q, k, v))
        mixed = call.attention(q, k, v).permute(2, 0, 1, 3).reshape(f, d, c)
        return self.to_out[0](mixed)


class GatedProjection(nn.Module):
    """Linear to twice the width, one half gating the other through an exact GELU."""

    def __init__(self, channels: int, inner: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = ops.Linear(channels, inner * 2, **factory)

    def forward(self, rows: Tensor) -> Tensor:
        value, gate = self.proj(rows).chunk(2, dim=-1)
        gate = functional.gelu(gate)
        return gate * value if torch.is_grad_enabled() else gate.mul_(value)


class FeedForward(nn.Module):
    """GEGLU feed-forward, four times the width; `net.1` is the dropout of the published layout."""

    def __init__(self, channels: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        inner = channels * 4
        self.net = nn.ModuleList(
            [GatedProjection(channels, inner, ops, **factory), nn.Identity(), ops.Linear(inner, channels, **factory)]
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.net[2](self.net[0](rows))


class TemporalBlock(nn.Module):
    """Pre-norm block: attentions over frames, each seeing the positions anew, then a feed-forward."""

    def __init__(self, spec: MotionSpec, channels: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        count = range(spec.attentions)
        self.attention_blocks = nn.ModuleList(
            [TemporalAttention(channels, spec.heads, ops, **factory) for _ in count]
        )
        self.norms = nn.ModuleList([ops.LayerNorm(channels, **factory) for _ in count])
        self.ff = FeedForward(channels, ops, **factory)
        self.ff_norm = ops.LayerNorm(channels, **factory)

    def forward(self, rows: Tensor, call: MotionCall, table: Tensor, scale: float | Tensor) -> Tensor:
        """Shapes: rows (f, d, c), table (f, 1, c) -> (f, d, c)."""
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            rows = rows + attention(norm(rows) + table, call, scale)
        return rows + self.ff(self.ff_norm(rows))


class ConvolutionBlock(nn.Module):
    """What the ablation of AnimateDiff has in place of attention: convolutions over frames, of the same size.

    Four of width 5 reach over 17 frames, and hold the 20 C^2 numbers of two attentions and a feed-forward. Source:
    arXiv 2307.04725, section 5.3, which states the size; norm and activation are chosen here.
    """

    def __init__(self, spec: MotionSpec, channels: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        count = range(CONVOLUTIONS)
        self.norms = nn.ModuleList([ops.LayerNorm(channels, **factory) for _ in count])
        self.convolutions = nn.ModuleList(
            [ops.Conv1d(channels, channels, WIDTH, padding=WIDTH // 2, **factory) for _ in count]
        )

    def forward(self, rows: Tensor, call: MotionCall, table: Tensor, scale: float | Tensor) -> Tensor:
        """Shapes: rows (f, d, c) -> (f, d, c). Positions and `scale`, which are of attention, are not used."""
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            rows = rows + convolution(functional.silu(norm(rows)).permute(1, 2, 0)).permute(2, 0, 1)
        return rows


class TemporalTransformer(nn.Module):
    """What one motion module adds to the feature map it sits behind."""

    def __init__(self, spec: MotionSpec, channels: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.channels = channels
        self.norm = ops.GroupNorm(spec.groups, channels, eps=1e-6, affine=True, **factory)
        self.proj_in = ops.Linear(channels, channels, **factory)
        block = TemporalBlock if spec.attentions else ConvolutionBlock
        self.transformer_blocks = nn.ModuleList([block(spec, channels, ops, **factory)])
        self.proj_out = ops.Linear(channels, channels, **factory)

    def forward(self, x: Tensor, call: MotionCall, joint_norm: bool = False) -> Tensor:
        """Return x plus the module's motion.

        Shapes: x (v f, c, h, w) -> the same; `f = call.frames`. The input is not written to.
        """
        n, c, h, w = x.shape
        normed = joint_group_norm(self.norm, x, call.frames, call.affine) if joint_norm else self.norm(x)
        normed = normed.reshape(n, c, h * w)
        table = sinusoid(call.positions, c).to(device=x.device, dtype=x.dtype)[:, None]
        scale, strength = on_grid(call.scale, x), on_grid(call.strength, x)
        if torch.is_grad_enabled():
            clips = [self._motion(normed[i : i + call.frames], call, table, _rows(scale, i, call, 0, h * w))
                     for i in range(0, n, call.frames)]
            return x + torch.cat(clips).transpose(1, 2).reshape(x.shape) * strength
        out = x.clone(memory_format=torch.contiguous_format)
        flat = out.view(n, c, h * w)
        flat_strength = strength.reshape(n, 1, h * w) if isinstance(strength, Tensor) else strength
        for i, a, b in _slabs(n, h * w, c, x.element_size(), call):
            clip = slice(i, i + call.frames)
            motion = self._motion(normed[clip, :, a:b], call, table, _rows(scale, i, call, a, b)).transpose(1, 2)
            if isinstance(flat_strength, Tensor):
                motion = motion * flat_strength[clip, :, a:b]
            elif flat_strength != 1.0:
                motion = motion * flat_strength
            flat[clip, :, a:b].add_(motion)
        return out

    def _motion(self, normed: Tensor, call: MotionCall, table: Tensor, scale: float | Tensor) -> Tensor:
        """Shapes: normed (f, c, d) -> (f, d, c)."""
        rows = self.proj_in(normed.transpose(1, 2))
        for block in self.transformer_blocks:
            rows = block(rows, call, table, scale)
        return self.proj_out(rows)


def _rows(scale: float | Tensor, first: int, call: MotionCall, a: int, b: int) -> float | Tensor:
    """Shapes: scale (v f, 1, h, w) -> (f, b - a, 1), the rows of one slab; numbers pass through."""
    if not isinstance(scale, Tensor):
        return scale
    return scale[first : first + call.frames].flatten(2)[:, :, a:b].transpose(1, 2)


def _slabs(n: int, d: int, c: int, item: int, call: MotionCall) -> Iterator[tuple[int, int, int]]:
    """Yield (first image of a clip, first position, last position) so that the widest temporary fits."""
    positions = max(1, call.slab_bytes // (call.frames * 8 * c * item))
    pieces = math.ceil(d / positions)
    step = math.ceil(d / pieces)
    for clip in range(0, n, call.frames):
        for a in range(0, d, step):
            yield clip, a, min(a + step, d)


class MotionModel(nn.Module):
    """All temporal transformers of a motion module, named as in the published files."""

    def __init__(self, spec: MotionSpec, ops: Any = nn, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        for name, channels in spec.slots:
            transformer = TemporalTransformer(spec, channels, ops, dtype=dtype, device=device)
            plant(self, f"{name}.temporal_transformer", transformer)

    def transformers(self) -> dict[str, TemporalTransformer]:
        """Every temporal transformer under its published slot name."""
        return {name: self.get_submodule(f"{name}.temporal_transformer") for name, _ in self.spec.slots}


def plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` under a dotted path, making the branches on the way."""
    *branches, leaf = path.split(".")
    for branch in branches:
        if branch not in root._modules:
            root.add_module(branch, nn.Module())
        root = root._modules[branch]
    root.add_module(leaf, module)
