"""Finish of the demo's autoencoder: the decoder alone, on whole pictures, where its worst pixels count most.

The encoder stays as it is, so that what was encoded before remains valid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..training.loop import LossFunction, Recipe
from . import config, world
from .autoencoder import pictures

RECIPE = Recipe("decoder", steps=2500, batch=8, learning_rate=1e-3, warmup=50, weight_decay=0.0, average=0.995, seed=8)
MOST_NOISE = 0.35  # on latents of deviation 1: with 0.05, outlines of sampled clips were worse than of encoded ones
WORST = 0.02  # share of the pixels that are counted a second time


def parameters(vae: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained: everything behind the latents."""
    return {name: p for name, p in vae.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))}


def loss_for(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> LossFunction:
    """Absolute and squared error of whole pictures, and the mean error of the worst pixels."""

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        images = pictures(RECIPE.batch, world.SIZE, np.random.default_rng([RECIPE.seed, step]))
        images = images.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0].float()
        spread = torch.linspace(0, MOST_NOISE, RECIPE.batch).view(-1, 1, 1, 1) / config.SCALE_FACTOR
        latents = latents + (spread * torch.randn(latents.shape, generator=generator)).to(device)
        decoded = vae.decoder(vae.post_quant_conv(latents.to(dtype))).float()
        error = (decoded - images.float()).abs().mean(1).flatten(1)
        worst = error.topk(int(WORST * error.shape[1]), dim=1).values
        return error.mean() + 2 * error.square().mean() + 0.2 * worst.mean()

    return loss_of
