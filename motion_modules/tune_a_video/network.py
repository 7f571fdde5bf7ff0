"""T-Attn: attention over frames at the end of each transformer block, in the tensor layout of the release.

Source: Wu et al., arXiv 2212.11565, section 3.2; tensor names and starting weights of showlab/Tune-A-Video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..animatediff.network import TemporalAttention, plant
from ..call import MotionCall

Slots = Sequence[tuple[str, int]]
"""(name of a transformer block such as `mid_block.attentions.0.transformer_blocks.0`, channels)."""


class TemporalLayer(nn.Module):
    """What T-Attn adds to the tokens of one transformer block; it knows no positions."""

    def __init__(self, channels: int, heads: int, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.norm_temp = ops.LayerNorm(channels, **factory)
        self.attn_temp = TemporalAttention(channels, heads, ops, **factory)

    def forward(self, x: Tensor, call: MotionCall) -> Tensor:
        """Return x plus attention over the frames of each clip, at every token's place.

        Shapes: x (v f, d, c) -> the same; `f = call.frames`. The input is not written to.
        """
        if torch.is_grad_enabled():
            return x + torch.cat([self._mixed(clip, call) for clip in x.split(call.frames)])
        out = x.clone()
        for clip, a, b in _slabs(x, call):
            out[clip, a:b] += self._mixed(x[clip, a:b], call)
        return out

    def _mixed(self, rows: Tensor, call: MotionCall) -> Tensor:
        mixed = self.attn_temp(self.norm_temp(rows), call, 1.0)
        return mixed if call.strength == 1.0 else mixed * call.strength


def _slabs(x: Tensor, call: MotionCall) -> Iterator[tuple[slice, int, int]]:
    """Yield (images of a clip, first place, last place) so that the temporaries fit."""
    n, d, c = x.shape
    places = max(1, call.slab_bytes // (call.frames * 8 * c * x.element_size()))
    step = math.ceil(d / math.ceil(d / places))
    for first in range(0, n, call.frames):
        for a in range(0, d, step):
            yield slice(first, first + call.frames), a, min(a + step, d)


class TunedModel(nn.Module):
    """The T-Attn of every transformer block of a UNet, named as in the published files."""

    def __init__(self, slots: Slots, heads: Sequence[int], ops: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.slots = tuple(slots)
        for (name, channels), count in zip(self.slots, heads, strict=True):
            plant(self, name, TemporalLayer(channels, count, ops, **factory))

    def layers(self) -> dict[str, TemporalLayer]:
        """Every layer under the name of its transformer block."""
        return {name: self.get_submodule(name) for name, _ in self.slots}


def temporal_shapes(slots: Slots) -> dict[str, tuple[int, ...]]:
    """Name and shape of every T-Attn tensor, norms included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, c in slots:
        shapes |= {f"{slot}.norm_temp.{part}": (c,) for part in ("weight", "bias")}
        shapes |= {f"{slot}.attn_temp.to_{part}.weight": (c, c) for part in ("q", "k", "v", "out.0")}
        shapes[f"{slot}.attn_temp.to_out.0.bias"] = (c,)
    return shapes


def trained_shapes(slots: Slots) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that tuning changes: both query projections, and T-Attn without its norm."""
    queries = {f"{slot}.{part}.to_q.weight": (c, c) for slot, c in slots for part in ("attn1", "attn2")}
    return queries | {name: shape for name, shape in temporal_shapes(slots).items() if ".norm_temp." not in name}


def initial_weights(slots: Slots, seed: int) -> dict[str, Tensor]:
    """Weights to begin training with, float32: the output weight is zero and its bias is not, as the authors begin.

    Source: showlab/Tune-A-Video; everything else is torch's own choice for linear layers, drawn from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in temporal_shapes(slots).items():
        if ".norm_temp." in name:
            found[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith(".to_out.0.weight"):
            found[name] = torch.zeros(shape)
        else:
            found[name] = (torch.rand(shape, generator=generator) * 2 - 1) * shape[-1] ** -0.5
    return found
