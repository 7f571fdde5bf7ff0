"""What a run learns from: the loss of a batch, and what the network is told besides the noisy clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..training.clips import Clips, stratified
from ..training.diffusion import LOSS_OF
from ..training.recipe import Recipe
from .unet import place_frames

LOSS_SCALE = 4096.0  # the gradient of a mean over a whole clip is below what float16 can hold


class Conditions:
    """What the network is told besides the noisy clip: the captions, in the form the model wants them."""

    def __init__(self, model: ModelPatcher, contexts: dict[str, list], clips: Clips) -> None:
        device = model.load_device
        noise = torch.zeros_like(clips.latents[0][: clips.frames]).to(device)
        self.frames, self.device = clips.frames, device
        self.of = {}
        for text, conditioning in contexts.items():
            entries = comfy.sampler_helpers.convert_cond(conditioning)
            told = comfy.samplers.encode_model_conds(model.model.extra_conds, entries, noise, device, "positive")
            self.of[text] = told[0]["model_conds"]

    def __call__(self, captions: list[str]) -> dict[str, Any]:
        """Shapes: every tensor (captions * frames, ...)."""
        every = [{name: told.process_cond(batch_size=self.frames, device=self.device, area=None)
                  for name, told in self.of[text].items()} for text in captions]  # fmt: skip
        first, *rest = every
        joined = {name: told.concat([other[name] for other in rest]) for name, told in first.items()}
        return {name: _ordinary(value, self.device) for name, value in joined.items()}


def _ordinary(value: Any, device: torch.device) -> Any:
    """Tensors made in inference mode may not be kept for a backward pass; copies made outside of it may."""
    if not isinstance(value, Tensor):
        return value
    return (value.clone() if value.is_inference() else value).to(device)


def noise_loss(base: Any, clips: Clips, conditions: Conditions, options: dict, recipe: Recipe) -> Callable:
    """Mean of what `recipe.loss` makes of an error in the network's prediction, noise or velocity: a clip has one noise
    level, its frames have noise each.

    The square of an error in the noise weighs 1 + sigma^2, at most `recipe.ceiling`: 1 is the plain loss of AnimateDiff
    and Tune-A-Video, unbounded it is the error in the velocity. The levels of a batch are spread evenly over
    `recipe.levels` of the schedule. Of a clip's frames `recipe.frames_seen` are in a batch, others in every batch, each
    at its place in time; `conditions` are for as many.
    """
    sampling, device = base.model_sampling, next(base.diffusion_model.parameters()).device
    most = math.inf if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else recipe.ceiling
    loss, seen = LOSS_OF[recipe.loss], recipe.frames_seen or clips.frames

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        latents, captions = clips.draw(recipe.batch, generator)
        if seen < clips.frames:
            at = torch.randperm(clips.frames, generator=generator)[:seen].sort().values
            place_frames(base.diffusion_model, options, at)
            latents = latents.unflatten(0, (recipe.batch, -1))[:, at].flatten(0, 1)
        levels = stratified(recipe.batch, len(sampling.sigmas), generator, recipe.levels)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        sigma = sampling.sigmas.cpu()[levels].repeat_interleave(seen).to(device)
        spread, latents = sigma.view(-1, 1, 1, 1), latents.to(device)
        noisy = sampling.noise_scaling(spread, noise, latents)
        told = conditions(captions)
        clean = base.apply_model(noisy, sigma, **told, transformer_options={**options, "sigmas": sigma[:1]})
        weight = (spread**2 + 1).clamp(max=most)
        return loss((clean - latents) / spread * weight.sqrt()).mean()

    return loss_of


def working_type(base: Any) -> torch.dtype:
    """The type the network computes in."""
    return getattr(base, "manual_cast_dtype", None) or base.get_dtype()


def precision_of(base: Any) -> str:
    """The same, as a recipe names it."""
    return str(working_type(base)).removeprefix("torch.")


def loss_scale(recipe: Recipe) -> float:
    """Factor on the loss that keeps gradients in the range of the type the network computes in."""
    return LOSS_SCALE if recipe.precision == "float16" else 1.0
