"""Last stages of the demo, as in the AnimateDiff paper: domain adapter, motion module, MotionLoRAs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..training.diffusion import add_noise, alphas_cumprod, noise_error
from ..training.loop import LossFunction, Recipe
from .autoencoder import initialise
from .image import CEILING, predict
from .latents import Order, Samples
from .text import Vocabulary, encode
from .world import FRAMES

ADAPTER = Recipe("adapter", steps=400, batch=32, learning_rate=2e-3, warmup=20, weight_decay=0.0, average=0.98, seed=3)
MOTION = Recipe("motion", steps=2000, batch=4, learning_rate=1.2e-3, warmup=60, average=0.995, seed=4)
ZOOM_IN = Recipe("zoom_in", steps=300, batch=4, learning_rate=3e-3, warmup=20, weight_decay=0.0, average=0.98, seed=5)
ZOOM_OUT = replace(ZOOM_IN, name="zoom_out", seed=6)

CLIPS = Order("clips", count=900, frames=FRAMES, mark=True, moving=0.85, seed=40)
ZOOM_IN_CLIPS = Order("zoom_in", count=120, frames=FRAMES, mark=True, moving=0.75, zoom=1.0, seed=50)
ZOOM_OUT_CLIPS = Order("zoom_out", count=120, frames=FRAMES, mark=True, moving=0.75, zoom=-1.0, seed=60)


def single_frames(clips: Samples) -> Samples:
    """Every frame of the clips as a clip of one frame."""
    frames = clips.latents.shape[1]
    return Samples(clips.latents.flatten(0, 1)[:, None], [text for text in clips.texts for _ in range(frames)])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention over few frames, spelled out as in `training.attention`. Shapes: (n, heads, f, d) each."""
    return torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1), v)


def initialise_motion(motion: nn.Module, generator: torch.Generator) -> None:
    """As `initialise`, with every output projection at zero: a new motion module changes nothing."""
    initialise(motion, generator)
    for name, parameter in motion.named_parameters():
        if ".temporal_transformer.proj_out." in name:
            nn.init.zeros_(parameter)


def clip_loss(unet: nn.Module, encoder: nn.Module, vocabulary: Vocabulary, samples: Samples, recipe: Recipe,
              device: torch.device, schedule: str, options: dict) -> LossFunction:  # fmt: skip
    """Noise prediction on clips (of one frame too): a clip has one step of the schedule, its frames noise each.

    `options` are the transformer options that put a motion module in place, or none.
    """
    kept = alphas_cumprod(schedule)
    frames = samples.latents.shape[1]

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        chosen = rng.integers(len(samples.texts), size=recipe.batch)
        rows = vocabulary.rows([samples.texts[i] for i in chosen], rng)
        latents = samples.latents[chosen].flatten(0, 1)
        steps = torch.from_numpy((np.arange(recipe.batch) + rng.random(recipe.batch)) / recipe.batch * len(kept)).long()
        steps = steps.repeat_interleave(frames)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, kept[steps])
        with torch.no_grad():
            context = encode(encoder, rows.to(device)).repeat_interleave(frames, dim=0)
        predicted = predict(unet, noisy.to(device), steps.to(device), context, **options)
        return noise_error(predicted, noise.to(device), kept[steps], CEILING)

    return loss_of
