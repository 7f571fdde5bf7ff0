"""One training step of a MotionLoRA on full-size SD1.5, beside the plain UNet's forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch.utils.flop_counter import FlopCounterMode

from ..host.inflate import Motion, MotionSettings
from ..host.motion import MotionModule
from ..host.train import Conditions, call_options, motion_call, noise_loss, video_unet
from ..host.training_layers import heavy_layers
from ..host.unet import host_affine
from ..training.clips import Clips
from ..training.frozen import frozen, recomputed, training
from ..training.loop import Recipe, fit
from ..training.lora import LowRankSet, attention_layers
from .motion import image_model, motion_module
from .side_by_side import in_turn, median_ratio, peak_bytes

Calls = dict[str, Callable[[], None]]


def first_counted(call: Callable[[], None], counts: dict[str, int]) -> Callable[[], None]:
    """The call; the first time it is made its peak memory and its FLOPs are counted, which takes a little longer."""

    def made() -> None:
        if counts:
            return call()
        with FlopCounterMode(display=False) as counter:
            counts["peak"] = peak_bytes(call)
        counts["flops"] = counter.get_total_flops()

    return made


@contextmanager
def step_calls(model: ModelPatcher, module: MotionModule, frames: int, size: int, rank: int) -> Iterator[Calls]:
    """One step that learns, and the plain UNet's two passes over the frames as images, down to the noisy latents.

    In both every weight of the UNet is fixed, its layers are computed anew in the backward pass, and attention is the
    same function. The host's weights are what they were once the context ends. size: of the latents.
    """
    comfy.model_management.load_models_gpu([model, module.patcher], force_full_load=True)
    model.pre_run()
    unet, network = model.model.diffusion_model, module.patcher.model
    recipe, width = Recipe("step", 1, 1, 1e-4), model.model.model_config.unet_config["context_dim"]
    with training(), frozen(model.model, network):
        latents = torch.randn(frames, 4, size, size)
        clips = Clips((latents,), ("",), frames, drop=0.0)
        open_clips = Clips((latents.clone().requires_grad_(),), ("",), frames, drop=0.0)
        conditions = Conditions(model, {"": [[torch.randn(1, 77, width), {}]]}, clips)
        names = attention_layers(network, ())
        changes, motion = LowRankSet(network, names, rank), Motion(module, MotionSettings())
        call = motion_call(model, frames, host_affine)

        def plain() -> None:
            with recomputed(heavy_layers(unet)):
                loss_of = noise_loss(model.model, open_clips, conditions, call_options(model), recipe)
                loss_of(0, torch.Generator().manual_seed(0)).backward()

        def learned() -> None:
            slots = motion.slots(unet, call)
            with changes.on(network), video_unet(model, slots, motion.joint, call, recompute=True) as options:
                loss_of = noise_loss(model.model, clips, conditions, options, recipe)
                fit(dict(changes.named_parameters()), loss_of, recipe)

        yield {"plain": plain, "learned": learned}
    model.cleanup()


def step_figures(size: int, frames: int, rank: int, rounds: int, models: Any = None) -> dict[str, float]:
    """Time, FLOPs and memory of a training step over those of the plain UNet's two passes. size: pixels a side.

    models: a MODEL and a motion module in place of SD1.5's published shapes with seeded random weights.
    """
    model, module = models or (image_model(torch.float32), motion_module(torch.float32))
    counts: dict[str, dict[str, int]] = {"plain": {}, "learned": {}}
    with step_calls(model, module, frames, size // 8, rank) as calls:
        seconds = in_turn({name: first_counted(call, counts[name]) for name, call in calls.items()}, rounds)
    return {
        "train.step_over_plain": median_ratio(seconds["learned"], seconds["plain"]),
        "train.step_flops_over_plain": counts["learned"]["flops"] / counts["plain"]["flops"],
        "train.step_seconds": min(seconds["learned"]),
        "train.plain_seconds": min(seconds["plain"]),
        "train.step_peak_mib": counts["learned"]["peak"] / 2**20,
        "train.plain_peak_mib": counts["plain"]["peak"] / 2**20,
    }
