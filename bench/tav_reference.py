"""The inflated UNet of Tune-A-Video in float64, written from the facts sheet: the other side of the parity figures.

Nothing of the pack or of the host is used. Weights carry the release's names; activations are whole clips,
`b c f h w`, as the authors have them: convolutions are 1x3x3, keys are gathered before they are projected, and every
attention is one softmax per frame and head group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


class TunedUNet:
    """weights: by the release's names, any type. heads: of every attention. own_frame: plain self-attention instead."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, own_frame: bool = False, joint: bool = True) -> None:
        self.weights, self.heads, self.own_frame, self.joint = weights, heads, own_frame, joint

    def __call__(self, clip: Tensor, time: float, text: Tensor) -> Tensor:
        """Shapes: clip (b, 4, f, h, w), text (b, n, c) -> (b, 4, f, h, w), float64."""
        text, emb = text.double(), self.time(time)
        x = self.conv(clip.double(), "conv_in")
        skips = [x]
        for i in self.count("down_blocks"):
            x = self.level(x, emb, text, f"down_blocks.{i}", skips, down=True)
            if self.has(f"down_blocks.{i}.downsamplers.0.conv"):
                x = self.conv(x, f"down_blocks.{i}.downsamplers.0.conv", stride=2)
                skips.append(x)
        x = self.resnet(x, emb, "mid_block.resnets.0")
        x = self.transformer(x, text, "mid_block.attentions.0")
        x = self.resnet(x, emb, "mid_block.resnets.1")
        for i in self.count("up_blocks"):
            x = self.level(x, emb, text, f"up_blocks.{i}", skips, down=False)
            if self.has(f"up_blocks.{i}.upsamplers.0.conv"):
                x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
                x = self.conv(x, f"up_blocks.{i}.upsamplers.0.conv")
        return self.conv(silu(self.clip_norm(x, "conv_norm_out")), "conv_out")

    def level(self, x: Tensor, emb: Tensor, text: Tensor, name: str, skips: list[Tensor], down: bool) -> Tensor:
        for j in self.count(f"{name}.resnets"):
            if not down:
                x = torch.cat((x, skips.pop()), dim=1)
            x = self.resnet(x, emb, f"{name}.resnets.{j}")
            if self.has(f"{name}.attentions.{j}.proj_in"):
                x = self.transformer(x, text, f"{name}.attentions.{j}")
            if down:
                skips.append(x)
        return x

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def count(self, name: str) -> range:
        return range(next(i for i in itertools.count() if not any(k.startswith(f"{name}.{i}.") for k in self.weights)))

    def get(self, name: str) -> Tensor:
        return self.weights[name].double()

    def linear(self, x: Tensor, name: str) -> Tensor:
        """On the last axis; 1x1 convolutions count as matrices."""
        out = x @ self.get(f"{name}.weight").flatten(1).T
        return out + self.get(f"{name}.bias") if f"{name}.bias" in self.weights else out

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self.get(f"{name}.weight")[:, :, None]
        edge = kernel.shape[-1] // 2
        return functional.conv3d(x, kernel, self.get(f"{name}.bias"), (1, stride, stride), (0, edge, edge))

    def affine(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.get(f"{name}.{part}").view(1, -1, 1, 1, 1) for part in ("weight", "bias"))
        return x * weight + bias

    def clip_norm(self, x: Tensor, name: str) -> Tensor:
        """GroupNorm(32) of the five-dimensional clip: one mean and variance for all of its frames."""
        if not self.joint:
            return self.frame_norm(x, name, 1e-5)
        groups = x.reshape(x.shape[0], 32, -1)
        spread = groups - groups.mean(-1, keepdim=True)
        return self.affine((spread / ((spread**2).mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape), name)

    def frame_norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        b, c, f, h, w = x.shape
        groups = x.reshape(b, 32, c // 32, f, h * w)
        spread = groups - groups.mean((2, 4), keepdim=True)
        return self.affine((spread / ((spread**2).mean((2, 4), keepdim=True) + eps).sqrt()).reshape(x.shape), name)

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        spread = x - x.mean(-1, keepdim=True)
        normed = spread / ((spread**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def time(self, time: float) -> Tensor:
        half = self.get("time_embedding.linear_1.weight").shape[1] // 2
        angles = time * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
        emb = self.linear(torch.cat((angles.cos(), angles.sin()))[None], "time_embedding.linear_1")
        return silu(self.linear(silu(emb), "time_embedding.linear_2"))

    def resnet(self, x: Tensor, emb: Tensor, name: str) -> Tensor:
        h = self.conv(silu(self.clip_norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = h + self.linear(emb, f"{name}.time_emb_proj")[:, :, None, None, None]
        h = self.conv(silu(self.clip_norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.conv_shortcut") if self.has(f"{name}.conv_shortcut") else x)

    def transformer(self, x: Tensor, text: Tensor, name: str) -> Tensor:
        b, _, f, h, w = x.shape
        z = self.linear(self.frame_norm(x, f"{name}.norm").permute(0, 2, 3, 4, 1).flatten(2, 3), f"{name}.proj_in")
        for k in self.count(f"{name}.transformer_blocks"):
            z = self.block(z, text, f"{name}.transformer_blocks.{k}")
        return x + self.linear(z, f"{name}.proj_out").reshape(b, f, h, w, -1).permute(0, 4, 1, 2, 3)

    def block(self, z: Tensor, text: Tensor, name: str) -> Tensor:
        """Shapes: z (b, f, n, c)."""
        normed = self.layer_norm(z, f"{name}.norm1")
        rows = []
        for i in range(z.shape[1]):
            seen = (i,) if self.own_frame else (0, max(i - 1, 0))
            keys = torch.cat([normed[:, j] for j in seen], dim=1)
            rows.append(self.attention(normed[:, i], keys, f"{name}.attn1"))
        z = z + torch.stack(rows, dim=1)
        normed = self.layer_norm(z, f"{name}.norm2")
        z = z + torch.stack([self.attention(normed[:, i], text, f"{name}.attn2") for i in range(z.shape[1])], dim=1)
        value, gate = self.linear(self.layer_norm(z, f"{name}.norm3"), f"{name}.ff.net.0.proj").chunk(2, dim=-1)
        gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
        z = z + self.linear(value * gelu, f"{name}.ff.net.2")
        if not self.has(f"{name}.norm_temp"):
            return z
        normed = self.layer_norm(z, f"{name}.norm_temp")
        places = [self.attention(normed[:, :, n], normed[:, :, n], f"{name}.attn_temp") for n in range(z.shape[2])]
        return z + torch.stack(places, dim=2)

    def attention(self, x: Tensor, seen: Tensor, name: str) -> Tensor:
        """Shapes: x (b, n, c), seen (b, m, c') -> (b, n, c)."""
        q, k, v = (self.linear(t, f"{name}.to_{part}").unflatten(-1, (self.heads, -1))
                   for t, part in ((x, "q"), (seen, "k"), (seen, "v")))  # fmt: skip
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
        return self.linear(mixed.flatten(-2), f"{name}.to_out.0")


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
