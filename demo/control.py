"""A ControlNet for the demo: edges of a picture, as the host's Canny node finds them, to where the shape goes.

Source: Zhang et al., arXiv 2302.05543: a copy of the UNet's encoder, joined to it through layers that start at zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from kornia.filters import canny
from torch import nn

from ..training.diffusion import add_noise, alphas_cumprod, noise_error
from ..training.loop import Recipe
from . import world
from .autoencoder import initialise
from .image import PICTURES, predict
from .latents import Order, Samples
from .text import Vocabulary, encode

RECIPE = Recipe("control", steps=900, batch=32, learning_rate=1e-3, warmup=30, weight_decay=0.0, average=0.99, seed=7)
LOW, HIGH = 0.1, 0.3  # thresholds of the edge finder


def initialise_control(network: nn.Module, generator: torch.Generator) -> None:
    """torch's default for the hint layers, zeros where the ControlNet joins the UNet; the encoder is left alone."""
    initialise(network.input_hint_block, generator)
    for parameter in (*network.zero_convs.parameters(), *network.middle_block_out.parameters()):
        nn.init.zeros_(parameter)


def hints(order: Order, chosen: np.ndarray) -> torch.Tensor:
    """Edges of the drawn pictures, white on black. Shapes: (n,) -> (n, 3, h, w) in {0, 1}."""
    return edges(world.draw(world.join([order.scene(int(index))[1] for index in chosen])))


def edges(pictures: torch.Tensor, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    """White on black. Shapes: (n, h, w, 3) in [0, 1] -> (n, 3, h, w) in {0, 1}."""
    return canny(pictures.permute(0, 3, 1, 2), low, high)[1].repeat(1, 3, 1, 1)


def loss_for(
    network: nn.Module,
    unet: nn.Module,
    encoder: nn.Module,
    vocabulary: Vocabulary,
    samples: Samples,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[int, torch.Generator], torch.Tensor]:
    """Noise prediction of the frozen UNet with the ControlNet's help; one caption in ten is dropped."""
    kept = alphas_cumprod("scaled_linear")

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([RECIPE.seed, step])
        chosen = rng.integers(len(samples.texts), size=RECIPE.batch)
        latents = samples.latents[chosen, 0]
        steps = torch.from_numpy((np.arange(RECIPE.batch) + rng.random(RECIPE.batch)) / RECIPE.batch * len(kept)).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, kept[steps]).to(device, dtype)
        with torch.no_grad():
            context = encode(encoder, vocabulary.rows([samples.texts[i] for i in chosen], rng).to(device))
        control = network(
            x=noisy, hint=hints(PICTURES, chosen).to(device, dtype), timesteps=steps.to(device), context=context
        )
        return noise_error(predict(unet, noisy, steps.to(device), context, control=control), noise.to(device))

    return loss_of
