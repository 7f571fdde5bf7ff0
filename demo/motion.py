"""Last stages of the demo, as in the AnimateDiff paper: domain adapter, motion module, MotionLoRAs."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import torch
from torch import nn

from ..training.diffusion import add_noise, alphas_cumprod, noise_error
from ..training.loop import LossFunction, Recipe
from .autoencoder import initialise
from .captions import DIRECTIONS
from .image import CEILING, predict
from .latents import Order, Samples
from .text import Vocabulary, encode
from .world import FRAMES

ADAPTER = Recipe("adapter", steps=400, batch=32, learning_rate=2e-3, warmup=20, weight_decay=0.0, average=0.98, seed=3)
COHERE = Recipe("motion_cohere", steps=1100, batch=4, learning_rate=1.2e-3, warmup=60, average=0.995, seed=4)
LAYOUT = Recipe("motion_layout", steps=3600, batch=4, learning_rate=1.3e-3, warmup=30, average=0.995, seed=16)
STEER = Recipe("motion_steer", steps=1000, batch=4, learning_rate=1.1e-3, warmup=20, average=0.99, seed=17)
ROUNDS = tuple(
    Recipe(f"motion_{number}", steps=1000, batch=4, learning_rate=9e-4, warmup=20, average=0.99, seed=18 + number)
    for number in (1, 2, 3, 4)
)
"""One after the other, each down to a rate of nothing; the module is the mean of what the last `AVERAGED` leave."""
AVERAGED = 3
CAMERA = Recipe("camera", steps=1200, batch=4, learning_rate=2e-3, warmup=30, weight_decay=0.0, average=0.99, seed=21)
CLEAR = replace(CAMERA, name="clear", steps=600, learning_rate=7e-4, seed=12)
STEADY = replace(CAMERA, name="steady", steps=600, learning_rate=8e-4, seed=41)
EVEN = replace(CAMERA, name="even", steps=420, learning_rate=7e-4, seed=43)
ZOOM_IN = tuple(replace(recipe, name=f"zoom_in_{recipe.name}") for recipe in (CAMERA, CLEAR, STEADY))
ZOOM_OUT = tuple(replace(recipe, name=f"zoom_out_{recipe.name}") for recipe in (CAMERA, CLEAR, STEADY, EVEN))
"""First how the size changes, then the outlines, as with the motion module; then that sizes do not tremble, and that
they go on changing, at the ends of a clip too."""
OUTLINES = {recipe.name: (200, 800) for recipe in (*ROUNDS, ZOOM_IN[1], ZOOM_OUT[1])}
ZOOMS = {recipe.name: (400, 1000) for recipe in (ZOOM_IN[0], ZOOM_OUT[0])}
STEADIED, EVENED = (ZOOM_IN[2].name, ZOOM_OUT[2].name), ZOOM_OUT[3].name
DIFFERENCES = {name: 2 for name in STEADIED} | {EVENED: 1}
"""Runs that also mind what errors do from frame to frame, as differences of the first or second order."""
MINDED = 12.0
"""How many times as much. A zoom changes sizes by a pixel a frame, and with the plain loss they trembled by 0.28, most
of it from the last third of sampling."""
FOCUS = {STEER.name: (850, 1000), EVENED: (0, 1000)} | OUTLINES | ZOOMS | {name: (0, 500) for name in STEADIED}
"""Steps of the schedule that half the samples of a run are from: where the direction is decided, where the outlines."""
RESTED = (EVENED,)
"""Runs that take half of their samples from captions without a direction, over which sizes changed too little."""
CEILINGS = (
    {LAYOUT.name: 600.0, STEER.name: 600.0, EVENED: 100.0}
    | {name: 25.0 for name in (*OUTLINES, *STEADIED)}
    | {name: 200.0 for name in ZOOMS}
)
"""What bounds the weights of the noisiest steps instead of CEILING. Sixteen frames show together where the shape goes
at steps so noisy that one of them shows nothing, and below CEILING these hardly count: after 714 steps of COHERE shapes
were right in 7 of 8 clips, and moved in none."""

CLIPS = Order("clips", count=5000, frames=FRAMES, mark=True, moving=0.85, seed=40)
"""Of 900 clips every one was learned by heart: all frames right in 0.96 of their captions, in 0.56 of unseen ones."""
ZOOM_IN_CLIPS = Order("zoom_in", count=2000, frames=FRAMES, mark=True, moving=0.7, zoom=1.0, seed=50)
ZOOM_OUT_CLIPS = Order("zoom_out", count=2000, frames=FRAMES, mark=True, moving=0.7, zoom=-1.0, seed=60)


def single_frames(clips: Samples, frames: int) -> Samples:
    """The first `frames` frames of the clips, each as a clip of one frame."""
    latents = clips.latents[:, :frames].flatten(0, 1)[:, None]
    return Samples(latents, [text for text in clips.texts for _ in range(frames)])


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
    frames, half = samples.latents.shape[1], recipe.batch // 2
    resting = np.flatnonzero([not DIRECTIONS.keys() & text.split() for text in samples.texts])

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        chosen = rng.integers(len(samples.texts), size=recipe.batch)
        if recipe.name in RESTED:
            chosen[:half] = rng.choice(resting, half)
        rows = vocabulary.rows([samples.texts[i] for i in chosen], rng)
        latents = samples.latents[chosen].flatten(0, 1)
        spread = _even(recipe.batch, 0, len(kept), rng)
        if recipe.name in FOCUS:
            spread = np.concatenate([_even(half, 0, len(kept), rng), _even(half, *FOCUS[recipe.name], rng)])
        steps = torch.from_numpy(spread).long().repeat_interleave(frames)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, kept[steps])
        with torch.no_grad():
            context = encode(encoder, rows.to(device)).repeat_interleave(frames, dim=0)
        predicted = predict(unet, noisy.to(device), steps.to(device), context, **options)
        return error_of(predicted, noise.to(device), kept[steps], recipe.name, frames)

    return loss_of


def error_of(predicted: torch.Tensor, noise: torch.Tensor, kept: torch.Tensor, run: str, frames: int) -> torch.Tensor:
    """The loss of one run, from noise (n * frames, c, h, w) predicted and true, and kept (n * frames,)."""
    ceiling = CEILINGS.get(run, CEILING)
    error = noise_error(predicted, noise, kept, ceiling)
    if run not in DIFFERENCES:
        return error
    order = DIFFERENCES[run]
    later = kept.unflatten(0, (-1, frames))[:, order:].flatten()
    changes = [differences(values, frames, order) for values in (predicted, noise)]
    return error + MINDED * noise_error(*changes, later, ceiling)


def differences(values: torch.Tensor, frames: int, order: int) -> torch.Tensor:
    """How frames differ from the one before (`order` 1), or from the middle of their neighbours (2), scaled so that
    noise keeps its deviation.

    Shapes: (n * frames, ...) -> (n * (frames - order), ...), float32.
    """
    changes = values.float().unflatten(0, (-1, frames)).diff(order, dim=1)
    return (changes / comb(2 * order, order) ** 0.5).flatten(0, 1)


def _even(count: int, first: int, end: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of [first, end), one from each of `count` equal parts."""
    return first + (np.arange(count) + rng.random(count)) / count * (end - first)
