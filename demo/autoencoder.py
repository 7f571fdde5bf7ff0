"""First stage of the demo: the autoencoder, trained on drawn pictures, its latents brought to the scale SD1.5 has."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..training.loop import LossFunction, Recipe
from . import config, world
from .captions import SHAPES, sentences

RECIPE = Recipe("autoencoder", steps=1600, batch=16, learning_rate=1e-3, weight_decay=1e-4, average=0.995, seed=1)
CROP = 64  # pixels; the last fifth of the steps sees whole pictures, a quarter as many
WHOLE_FROM = 0.8
KL_WEIGHT = 2e-4
LATENT_NOISE = 0.05  # the decoder must forgive what a diffusion model gets slightly wrong
GROUPS = 4


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """torch's default initialisation, drawn from `generator`; the host's layers come uninitialised."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
            elif name == "bias" or parameter.ndim < 2:
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)


def pictures(count: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
    """Training pictures (n, 3, crop, crop) in [-1, 1]: three quarters from the world, marked or not, the rest in
    free colours so that the autoencoder is one for pictures and not for six colours."""
    words = sentences("train", moving=False)
    parts = []
    for size in [len(part) for part in np.array_split(np.arange(count), GROUPS)]:
        left, top = (int(v) for v in rng.integers(0, world.SIZE - crop + 1, 2))
        chosen = [words[i] for i in rng.integers(len(words), size=size)]
        scene = world.join([world.still(w, rng, mark=rng.random() < 0.4) for w in chosen])
        if crop < world.SIZE:
            scene.centre[:] = rng.uniform((left, top), (left + crop, top + crop), (size, 2))
        free = rng.random(size) < 0.25
        scene.colour[free], scene.ground[free] = rng.random((2, int(free.sum()), 3))
        scene.shape[free] = rng.integers(len(SHAPES), size=int(free.sum()))
        parts.append(world.draw(scene, (left, top, crop, crop)))
    return torch.cat(parts).permute(0, 3, 1, 2) * 2 - 1


def loss_for(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> LossFunction:
    """The loss of a step: absolute and squared error, a light pull of the latents towards a unit Gaussian."""

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        whole = step >= WHOLE_FROM * RECIPE.steps
        rng = np.random.default_rng([RECIPE.seed, step])
        images = pictures(RECIPE.batch // 4 if whole else RECIPE.batch, world.SIZE if whole else CROP, rng)
        images = images.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        latent = mean + noise * (torch.exp(0.5 * logvar) + LATENT_NOISE)
        error = vae.decoder(vae.post_quant_conv(latent.to(dtype))).float() - images.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * divergence

    return loss_of


@torch.no_grad()
def calibrate(vae: nn.Module) -> None:
    """Fold a shift and a scale per channel into the two 1x1 convolutions, in place, so that latents times
    `config.SCALE_FACTOR` have mean 0 and deviation 1 over the world's pictures."""
    images = pictures(128, world.SIZE, np.random.default_rng(0))
    latents = torch.cat([vae.quant_conv(vae.encoder(part)).chunk(2, dim=1)[0] for part in images.split(16)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (deviation * config.SCALE_FACTOR)
    channels = len(gain)
    vae.quant_conv.weight[:channels] *= gain[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) * gain
    vae.quant_conv.bias[channels:] += 2 * gain.log()
    vae.post_quant_conv.bias += functional.conv2d(mean[None, :, None, None], vae.post_quant_conv.weight)[0, :, 0, 0]
    vae.post_quant_conv.weight /= gain[None, :, None, None]
