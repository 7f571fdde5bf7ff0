"""Tune-A-Video: SD1.5 in full size against a float64 network, the time of a step, and edits in the toy world."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..demo import config
from ..host import tune
from ..host.train import Conditions, noise_loss, working_type
from ..host.tuned import apply_tuned, names_of, original_weight, places_of, slots_of
from ..motion_modules.tune_a_video.checkpoint import QUERIES, TunedFile
from ..motion_modules.tune_a_video.network import Slots, temporal_shapes, trained_shapes
from ..training.attention import attention
from ..training.clips import Clips
from ..training.frozen import frozen, training
from ..training.loop import Recipe, fit
from . import tav_toy
from .memory import CONTEXT, WIDTH, small
from .motion import SD15, image_model
from .side_by_side import device_name, in_turn, median_ratio, peak_bytes, report
from .tav_reference import TunedUNet
from .toy import Bench
from .train_step import SHAPES, Errors, Shapes, errors_of

STEP = 500
ONE_CLIP = Recipe("a clip at a time", steps=1, batch=1, learning_rate=0.0)


def tuned_file(model: ModelPatcher, seed: int = 0) -> TunedFile:
    """A whole UNet as the authors save it: the MODEL's own weights, other queries, and T-Attn that does something."""
    slots, generator = slots_of(model), torch.Generator().manual_seed(seed)
    temporal = {name: seeded(name, shape, generator) for name, shape in temporal_shapes(slots).items()}
    weight_of, own = original_weight(model), model.model.diffusion_model.state_dict()
    weights = {theirs: weight_of(theirs) for theirs, ours in names_of(model).items() if ours in own}
    for slot, channels in slots:
        for part in QUERIES:
            change = 0.2 * seeded("weight", (channels, channels), generator)
            weights[f"{slot}.{part}.weight"] = weights[f"{slot}.{part}.weight"] + change
    return TunedFile("tuned on one clip", slots, temporal, weights=weights)


def seeded(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Matrices keep the variance of what they multiply, norms are near one, biases near zero."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * shape[1] ** -0.5
    return 0.1 * values + (1.0 if name.endswith("weight") else 0.0)


def predicted_noise(model: ModelPatcher, x: Tensor, text: Tensor) -> Tensor:
    """What the network takes for noise in x, in one call as a sampler makes it.

    Shapes: x (f, c, h, w), text (1, n, c) -> (f, c, h, w).
    """
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    options = {**model.model_options["transformer_options"], "cond_or_uncond": [0], "wrappers": model.wrappers,
               "callbacks": model.callbacks}  # fmt: skip
    sigma = model.get_model_object("model_sampling").sigmas[STEP].to(x)
    text = text.expand(len(x), -1, -1)
    clean = model.model.apply_model(x, sigma.expand(len(x)), c_crossattn=text, transformer_options=options)
    return (x.double() - clean.double()) / sigma.double()


def parity(model: ModelPatcher, file: TunedFile, frames: int, size: int) -> float:
    """Largest difference between the pack's call and the float64 network's, as a share of the largest value."""
    x = torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(2))
    width = model.model.model_config.unet_config["context_dim"]
    text = torch.randn(1, 77, width, generator=torch.Generator().manual_seed(3))
    device = model.load_device
    found = predicted_noise(apply_tuned(model, file), x.to(device), text.to(device)).cpu()
    sigma = model.get_model_object("model_sampling").sigmas[STEP].double().cpu()
    scaled = (x.double() / (sigma**2 + 1) ** 0.5).transpose(0, 1)[None]
    heads = model.model.diffusion_model.middle_block[1].transformer_blocks[0].n_heads
    expected = TunedUNet({**file.weights, **file.temporal}, heads)(scaled, STEP, text)[0].transpose(0, 1)
    return float((found - expected).abs().max() / expected.abs().max())


def step_calls(model: ModelPatcher, frames: int, size: int) -> tuple[ExitStack, dict[str, Callable[[], None]]]:
    """Forward and backward of the plain UNet on the frames as images, and of the tuned one on them as a clip.

    In both the query projections are trained, layers are computed once, and attention is the same function.
    Returns what keeps the host's weights out of the training, to be closed, and the two calls.
    """
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    model.pre_run()
    unet, width = model.model.diffusion_model, model.model.model_config.unet_config["context_dim"]
    places = places_of(model)
    names = {f"{slot}.{part}.weight": f"{places[slot]}.{part}" for slot in places for part in QUERIES}
    stack = ExitStack()
    stack.enter_context(training())
    stack.enter_context(frozen(model.model))
    stack.callback(model.cleanup)
    network = tune.new_network(model, 0)
    clips = Clips((torch.randn(frames, 4, size, size),), ("",), frames, drop=0.0)
    conditions = Conditions(model, {"": [[torch.randn(1, 77, width), {}]]}, clips)
    own = {**model.model_options["transformer_options"], "optimized_attention_override": attention,
           "cond_or_uncond": [0]}  # fmt: skip

    def loss_of(options: dict) -> Callable:
        return noise_loss(model.model, clips, conditions, options, ONE_CLIP)

    def plain() -> None:
        with tune.trainable(unet, names, working_type(model.model)):
            loss_of(own)(0, torch.Generator().manual_seed(0)).backward()

    def tuned() -> None:
        with tune.tuned_unet(model, network, frames, recompute=False) as (_, options):
            loss_of(options)(0, torch.Generator().manual_seed(0)).backward()

    return stack, {"plain": plain, "tuned": tuned}


def step_figures(model: ModelPatcher, frames: int, size: int, rounds: int) -> dict[str, float]:
    """Time of a tuning step over the plain UNet's, as the median over rounds, and what FLOPs alone would make of it."""
    stack, calls = step_calls(model, frames, size)
    flops = {}
    with stack:
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            flops[name] = counter.get_total_flops()
        seconds = in_turn(calls, rounds)
    return {
        "tav.step_over_plain": median_ratio(seconds["tuned"], seconds["plain"]),
        "tav.step_flops_over_plain": flops["tuned"] / flops["plain"],
        "tav.step_seconds": min(seconds["tuned"]),
    }


def estimate_errors(shapes: Shapes = SHAPES, width: int = WIDTH) -> Errors:
    """Of a run of two steps. width: channels of the finest level of a UNet with SD1.5's layout."""
    model = small((width, 2 * width, 4 * width, 4 * width), 2, model_channels=width)[0]
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    two, text = replace(ONE_CLIP, steps=2), torch.randn(1, 77, CONTEXT)

    def taken(frames: int, size: tuple[int, int], recompute: bool) -> tuple[int, int]:
        clips = Clips((torch.randn(frames, 4, *size),), ("",), frames, drop=0.0)

        def learn() -> None:
            network = tune.new_network(model, 0)
            with tune.tuned_unet(model, network, frames, recompute) as (parameters, options):
                fit(parameters, noise_loss(model.model, clips, conditions, options, two), two)

        with training(), frozen(model.model):
            conditions = Conditions(model, {"": [[text, {}]]}, clips)
            return tune.foreseen(model, frames, size, recompute)[1], peak_bytes(learn)

    return errors_of(taken, shapes)


def trained_parameters(slots: Slots) -> int:
    return sum(torch.Size(shape).numel() for shape in trained_shapes(slots).values())


def full_size(arguments: Any) -> dict[str, float]:
    frames, size = arguments.frames, arguments.size
    print(f"SD1.5's UNet on {frames} frames of {size}x{size}, float32 on {device_name()}", flush=True)
    model = image_model(torch.float32, SD15)
    figures = {
        "tav.trained_parameters": trained_parameters(slots_of(model)),
        "tav.parity": parity(model, tuned_file(model), frames, size // 8),
    }
    print(f"relative error {figures['tav.parity']:.2e}", flush=True)
    return figures | (step_figures(model, frames, size // 8, arguments.rounds) if arguments.rounds else {})


def toy_world(arguments: Any) -> dict[str, float]:
    recipe = tav_toy.RECIPE
    print(f"{arguments.clips} clips on curved paths, {len(tav_toy.KINDS)} edits each: {recipe.steps} tuning steps at "
          f"{recipe.learning_rate:g}, {tav_toy.STEPS} steps ({tav_toy.SCHEDULER}), cfg {tav_toy.CFG:g}, on "
          f"{device_name()}", flush=True)  # fmt: skip
    bench = Bench.open(arguments.weights)
    return tav_toy.measure(bench, arguments.clips, arguments.ablated, arguments.minutes, arguments.sheets)


def estimate(arguments: Any) -> dict[str, float]:
    return {"tav.estimate_error_max": max(map(abs, estimate_errors().values()))}


SECTIONS = {"full_size": full_size, "toy": toy_world, "estimate": estimate}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench tav", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="measure only these")
    full = parser.add_argument_group("full_size")
    full.add_argument("--size", type=int, default=128, help="pixels a side")
    full.add_argument("--frames", type=int, default=3)
    full.add_argument("--rounds", type=int, default=2, help="time training steps in so many rounds; 0: do not")
    toy = parser.add_argument_group("toy")
    toy.add_argument("--clips", type=int, default=20, help="clips to tune on and edit")
    toy.add_argument("--ablated", type=int, default=6, help="of which so many are edited without each part too")
    toy.add_argument("--weights", type=Path, default=config.WEIGHTS, help="folder of the demo weights")
    toy.add_argument("--minutes", type=float, default=float("inf"), help="begin no further clip after this time")
    toy.add_argument("--sheets", type=Path, help="write a picture of every clip and its edits to this folder")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    figures: dict[str, float] = {}
    with torch.inference_mode():
        for name in arguments.only:
            figures |= SECTIONS[name](arguments)
    report(figures, arguments.json)
    return 0
