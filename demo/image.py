"""Second stage of the demo: text encoder and image UNet, trained together on clean pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..training.attention import attention
from ..training.diffusion import add_noise, alphas_cumprod, noise_error
from ..training.loop import LossFunction, Recipe
from .autoencoder import initialise
from .captions import DIRECTIONS
from .latents import Openings, Order, Samples
from .text import Vocabulary, encode, read_back

RECIPE = Recipe("image", steps=2600, batch=32, learning_rate=1e-3, warmup=200, average=0.998, seed=2)
FINISH = Recipe("image_finish", steps=2000, batch=32, learning_rate=8e-4, warmup=30, average=0.998, seed=9)
POLISH = Recipe("image_polish", steps=5000, batch=32, learning_rate=6e-4, warmup=30, average=0.998, seed=12)
COMPOSE = Recipe("image_compose", steps=1800, batch=32, learning_rate=1.2e-3, warmup=30, average=0.99, seed=19)
SETTLE = Recipe("image_settle", steps=480, batch=32, learning_rate=7e-4, warmup=20, average=0.98, seed=21)
STRESS = 80.0  # length of the vectors of the words for directions when COMPOSE begins; what later layers add is as long
PLAIN_STEPS = 868  # first the looks, from the plain loss; then what the captions say
CEILING = 20.0
READ_BACK = 0.1  # weight of telling the directions apart, in COMPOSE and SETTLE
MIDDLE = {FINISH.name: (200, 700), POLISH.name: (300, 900), COMPOSE.name: (700, 1000), SETTLE.name: (250, 1000)}
"""The later runs spend half their samples on the steps that decide which shape it becomes, and then that it is one."""
MIDDLE_CEILING = {FINISH.name: 4.0, POLISH.name: 8.0, COMPOSE.name: 220.0, SETTLE.name: 30.0}
PICTURES = Order("pictures", count=12000, moving=0.65, seed=20)
OPENINGS = Openings("openings", count=4000, moving=0.8, seed=25)


def initialise_unet(unet: nn.Module, generator: torch.Generator) -> None:
    """As `initialise`, and every residual branch starts at zero, as its authors have it."""
    initialise(unet, generator)
    for name, parameter in unet.named_parameters():
        if any(part in name for part in ("out_layers.3.", ".proj_out.")) or name.startswith("out.2."):
            nn.init.zeros_(parameter)


def predict(unet: nn.Module, noisy: torch.Tensor, steps: torch.Tensor, context: torch.Tensor,
            control: dict[str, list[torch.Tensor]] | None = None, **options: object) -> torch.Tensor:  # fmt: skip
    """The UNet's idea of the noise. Shapes: noisy (n, 4, h, w), steps (n,), context (n, 77, c) -> (n, 4, h, w).

    `control` is what a ControlNet of the host returned; `options` are transformer options.
    """
    noisy = noisy.to(context.dtype).contiguous(memory_format=torch.channels_last)
    options = {"optimized_attention_override": attention, **options}
    return unet(noisy, steps, context, control=control, transformer_options=options)


def loss_for(unet: nn.Module, encoder: nn.Module, vocabulary: Vocabulary, samples: Samples, recipe: Recipe,
             device: torch.device) -> LossFunction:  # fmt: skip
    """Noise prediction on stills, captions dropped for one in ten."""
    kept = alphas_cumprod("scaled_linear")
    directions = vocabulary.numbers(DIRECTIONS)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        chosen = rng.integers(len(samples.texts), size=recipe.batch)
        latents = samples.latents[chosen, 0]
        rows = vocabulary.rows([samples.texts[i] for i in chosen], rng)
        # one step from each of `batch` equal stretches of the schedule: less scatter than drawing them freely
        spread = (np.arange(recipe.batch) + rng.random(recipe.batch)) / recipe.batch * len(kept)
        if recipe.name in MIDDLE:
            first, last = MIDDLE[recipe.name]
            spread[::2] = first + spread[::2] / len(kept) * (last - first)
        steps = torch.from_numpy(spread).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, kept[steps])
        context = encode(encoder, rows.to(device))
        predicted = predict(unet, noisy.to(device), steps.to(device), context)
        ceiling = MIDDLE_CEILING.get(recipe.name, 1.0 if step < PLAIN_STEPS else CEILING)
        error = noise_error(predicted, noise.to(device), kept[steps], ceiling)
        return error + READ_BACK * read_back(context, rows, directions) if recipe in (COMPOSE, SETTLE) else error

    return loss_of
