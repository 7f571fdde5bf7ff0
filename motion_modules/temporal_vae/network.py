"""The temporal layers of Reuse and Diffuse's VAE decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STAGES = 3


class TemporalConvs(nn.Module):
    """Convolutions over the frames of a clip, added to what came in; a single frame passes unchanged.

    Source: TemporalConvLayer of anonymous0x233/ReuseAndDiffuse, vae/modules.py (tensor names and formula): three times
    GroupNorm over all frames, SiLU, dropout, Conv3d (3, 1, 1).
    """

    def __init__(self, channels: int, ops: Any = nn, stages: int = STAGES, dtype: torch.dtype | None = None,
                 device: Any = None) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(stages):
            norm = ops.GroupNorm(32, channels, eps=1e-5, dtype=dtype, device=device)
            conv = ops.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0), dtype=dtype, device=device)
            layers += [norm, nn.SiLU(), nn.Dropout(0.1), conv]
        self.convs = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (f, c, h, w), the frames of one clip -> the same."""
        if len(x) == 1:
            return x
        clip = x.transpose(0, 1)[None]
        for layer in self.convs:
            clip = layer(clip)
        return x + clip[0].transpose(0, 1)

    def stages(self) -> list[tuple[nn.GroupNorm, nn.Conv3d]]:
        """The norm and the convolution of each stage."""
        return list(zip(self.convs[::4], self.convs[3::4], strict=True))
