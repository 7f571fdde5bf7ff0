"""What a network draws while it learns: a clip, always from the same noise, as approximate colours of its latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from ..training.clips import EMPTY, Clips
from ..training.diffusion import euler
from .preview import chosen_frames, painter_of
from .unet import CALLS, place_frames

STEPS, GUIDANCE = 12, 5.0
PICTURES, STRIP_WIDTH = 8, 480  # of a strip, and its width in pixels
STILLS = 4  # captions that are drawn where a clip is one picture


class Samples:
    """Draws the first caption as a clip (the first few where a clip is one picture) with the weights of the moment."""

    def __init__(self, base: Any, clips: Clips, conditions: Callable, options: dict, seed: int) -> None:
        self.base, self.conditions, self.options = base, conditions, options
        self.frames = clips.frames
        self.captions = [*dict.fromkeys(clips.captions)][: STILLS if clips.frames == 1 else 1]
        shape = (len(self.captions) * clips.frames, *clips.latents[0].shape[1:])
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.painter = painter_of(base.latent_format)

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Shapes: -> (captions * frames, c, h, w)."""
        sampling, device = self.base.model_sampling, next(self.base.diffusion_model.parameters()).device
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS).to(device)
        told = [self.conditions(captions) for captions in (self.captions, [EMPTY] * len(self.captions))]
        noise = self.noise.to(device)
        if self.options.get(CALLS):  # the steps of the run may have seen fewer
            place_frames(self.base.diffusion_model, self.options, torch.arange(self.frames))

        def clean_of(x: Tensor, sigma: Tensor) -> Tensor:
            levels, options = sigma.expand(len(x)), {**self.options, "sigmas": sigma[None]}
            with_text, without = (self.base.apply_model(x, levels, **one, transformer_options=options) for one in told)
            return without + GUIDANCE * (with_text - without)

        start = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise))
        return euler(clean_of, start, sigmas)

    def strip(self) -> Image.Image | None:
        """Some frames side by side; None for a model whose latents the host has no colours for."""
        if self.painter is None:
            return None
        frames = chosen_frames(self.latents())[: 2 * PICTURES : 2 if len(self.noise) > PICTURES else 1]
        pictures = [self.painter.decode_latent_to_preview(frame) for frame in frames]
        width = STRIP_WIDTH // max(len(pictures), STILLS)
        height = max(1, round(width * pictures[0].height / pictures[0].width))
        whole = Image.new("RGB", (STRIP_WIDTH, height))
        for number, picture in enumerate(pictures):
            whole.paste(picture.resize((width, height)), (number * width, 0))
        return whole
