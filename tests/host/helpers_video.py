"""Small random video models of the host with 5-D latents, for the tests of long clips."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

CHANNELS, SIDE, TEXT = 16, 4, 32
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2,
    "freq_dim": 32, "text_dim": TEXT, "in_dim": CHANNELS, "out_dim": CHANNELS, "patch_size": (1, 2, 2),
}  # fmt: skip


def wan(seed: int = 0, **changes: Any) -> ModelPatcher:
    """A MODEL of the host's Wan 2.1 class; of VACE and HuMo with that model_type, of Wan 2.2 5B with out_dim=48.

    With in_dim=36 it takes an image and a mask per frame beside its latents.
    """
    known, settings = comfy.supported_models, WAN | changes
    kind = {"vace": known.WAN21_Vace, "humo": known.WAN21_HuMo}.get(settings["model_type"], known.WAN21_T2V)
    config = (known.WAN22_T2V if settings["out_dim"] == 48 else kind)(settings)
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = config.get_model({}, "", device=None)
        tiny_host.randomize(model.diffusion_model, seed)
    return ModelPatcher(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int, **more: Any) -> list:
    """CONDITIONING of seven random tokens."""
    return [[torch.randn(1, 7, TEXT, generator=torch.Generator().manual_seed(seed)), more]]


def sample(model: ModelPatcher, frames: int, videos: int = 1, **settings: Any) -> Tensor:
    """Run the host's sampler from noise: (videos, 16, frames, 4, 4)."""
    settings = {"start": torch.zeros(videos, CHANNELS, frames, SIDE, SIDE), "positive": text(1), "negative": text(2),
                **settings}  # fmt: skip
    return tiny_host.sample(model, **settings)
