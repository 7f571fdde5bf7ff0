"""Applying a motion module through its node and sampling with it, for the tests of its settings and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import reference_motion as reference
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from latentmotion.host.motion import MotionModule
from torch import Tensor

APPLY = "LatentMotionApplyMotionModule"
SAME = 1e-5  # relative; the host splits and batches its work differently from run to run
DEFAULTS: dict[str, Any] = {"strength": 1.0, "motion_scale": 1.0, "start_percent": 0.0, "end_percent": 1.0,
                            "frames": 0, "noise_schedule": "as trained", "positions": "as trained",
                            "group_norm": "as trained"}
Run = Callable[..., tuple]


def apply(run_node: Run, model: ModelPatcher, module: MotionModule, **settings: Any) -> ModelPatcher:
    return run_node(APPLY, model=model, motion_module=module, **(DEFAULTS | settings))[0]


def noise(frames: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def draw(model: ModelPatcher, start: Tensor, steps: int = 2, cfg: float = 2.0, tokens: tuple[int, int] = (77, 77)
         ) -> Tensor:
    """Sample an empty latent from this noise."""
    texts = [tiny_host.conditioning(model, seed, tokens=count) for seed, count in zip((1, 2), tokens, strict=True)]
    return comfy.sample.sample(model, start, steps, cfg, "euler", "normal", *texts, torch.zeros_like(start), seed=1,
                               disable_pbar=True)


def error(found: Tensor, expected: Tensor) -> float:
    return reference.relative_error(found, expected)
