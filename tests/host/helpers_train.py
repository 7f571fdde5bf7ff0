"""What the tests of training share: stand-ins for a CLIP, a VAE and a person who watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers_motion import SMALL_WIDTHS, motion_module
from latentmotion.host.motion import MotionModule
from torch import Tensor, nn

FRAMES = 4
WIDGETS = {
    "file_name": "learned", "rank": 4, "alpha": 8.0, "steps": 6, "learning_rate": 0.02, "frames": FRAMES, "stride": 1,
    "clip_length": 0, "batch_size": 2, "accumulate": 1, "seed": 3, "gradient_checkpointing": True, "save_every": 100,
    "existing": "go on", "sample_every": 0,
}  # fmt: skip


def small_module(**layout: Any) -> MotionModule:
    return motion_module(widths=SMALL_WIDTHS, layers=1, **layout)


class Text:
    """Stands for a CLIP: a caption is a row of numbers made from its letters. off: added to every number."""

    def __init__(self, width: int = 32, off: float = 0.0) -> None:
        self.asked: list[str] = []
        self.width, self.off = width, off

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        self.asked.append(text)
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        return [[torch.randn(1, 7, self.width, generator=generator) + self.off, {"pooled_output": None}]]


class Pictures:
    """Stands for a VAE: latents are the pictures' coarse colours and their brightness. off: added to every number.
    asked: how many pictures it was given."""

    def __init__(self, channels: int = 4, off: float = 0.0) -> None:
        self.latent_channels, self.off, self.asked = channels, off, 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.asked += len(pixels)
        coarse = nn.functional.avg_pool2d(pixels.movedim(-1, 1) * 8 - 4, 8) + self.off
        return torch.cat((coarse, coarse.mean(1, keepdim=True)), dim=1)


class Recorder:
    """Stands for the progress of a run; `at(step)` may do what a test wants to happen then."""

    def __init__(self, at: Callable[[int], None] | None = None) -> None:
        self.losses: list[float] = []
        self.at = at

    def __call__(self, path: object, total: int, losses: list[float], *more: object) -> Callable:
        self.losses = losses
        return lambda step, total, loss: self.at and self.at(step)


def traces(*networks: nn.Module) -> list[tuple]:
    """What must be as it was: which objects the weights are, what they ask for, what hangs on the layers."""
    tensors = [(id(p), p.requires_grad, p.is_inference()) for n in networks for p in n.parameters()]
    layers = [(id(m), tuple(vars(m).get("_forward_hooks", ())), "forward" in vars(m)) for n in networks
              for m in n.modules()]  # fmt: skip
    return [*tensors, *layers]
