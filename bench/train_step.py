"""One training step of a MotionLoRA on full-size SD1.5, beside the plain UNet's forward and backward pass; and how well
the memory of a step is foreseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..host.inflate import Motion, MotionSettings
from ..host.motion import MotionModule
from ..host.train import Conditions, call_options, lora_size, motion_call, noise_loss, video_unet
from ..host.training_layers import heavy_layers, layers_of
from ..host.unet import host_affine
from ..training.clips import Clips
from ..training.estimate import run_bytes
from ..training.frozen import frozen, recomputed, training
from ..training.loop import Recipe, fit
from ..training.lora import LowRankSet, attention_layers
from .memory import WIDTH, small
from .motion import image_model, motion_module
from .side_by_side import in_turn, median_ratio, peak_bytes

Calls = dict[str, Callable[[], None]]
Shapes = tuple[tuple[int, int, int], ...]
Errors = dict[tuple[int, int, int, bool], float]
RANK = 8  # of the small networks
SHAPES = ((8, 8, 8), (16, 16, 16), (4, 24, 24))  # frames, height, width in latent pixels


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions.

    torch's own FlopCounterMode follows the modules, and keeps what a layer that is computed twice would let go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def first_counted(call: Callable[[], None], counts: dict[str, int]) -> Callable[[], None]:
    """The call; the first time it is made its peak memory and its FLOPs are counted, which takes a little longer."""

    def made() -> None:
        if counts:
            return call()
        with Flops() as counter:
            counts["peak"] = peak_bytes(call)
        counts["flops"] = counter.total

    return made


@contextmanager
def step_calls(model: ModelPatcher, module: MotionModule, frames: int, size: tuple[int, int], rank: int,
               recompute: bool = True) -> Iterator[Calls]:  # fmt: skip
    """A step that learns, two of them by a MotionLoRA that is made for them, and the plain UNet's two passes over the
    frames as images, down to the noisy latents.

    In all of them every weight of the UNet is fixed, its layers are computed anew in the backward pass where
    `recompute` says so, and attention is the same function. The host's weights are what they were once the context
    ends. size: of the latents.
    """
    comfy.model_management.load_models_gpu([model, module.patcher], force_full_load=True)
    model.pre_run()
    unet, network = model.model.diffusion_model, module.patcher.model
    one, two = (Recipe("step", steps, 1, 1e-4) for steps in (1, 2))
    width = model.model.model_config.unet_config["context_dim"]
    with training(), frozen(model.model, network):
        latents = torch.randn(frames, 4, *size)
        clips = Clips((latents,), ("",), frames, drop=0.0)
        open_clips = Clips((latents.clone().requires_grad_(),), ("",), frames, drop=0.0)
        conditions = Conditions(model, {"": [[torch.randn(1, 77, width), {}]]}, clips)
        names = attention_layers(network, ())
        kept, motion = LowRankSet(network, names, rank), Motion(module, MotionSettings())
        call = motion_call(model, frames, host_affine)

        def plain() -> None:
            with recomputed(heavy_layers(unet) if recompute else ()):
                loss_of = noise_loss(model.model, open_clips, conditions, call_options(model), one)
                loss_of(0, torch.Generator().manual_seed(0)).backward()

        def learned(changes: LowRankSet = kept, recipe: Recipe = one) -> None:
            slots = motion.slots(unet, call)
            with changes.on(network), video_unet(model, slots, motion.joint, call, recompute) as options:
                loss_of = noise_loss(model.model, clips, conditions, options, recipe)
                fit(dict(changes.named_parameters()), loss_of, recipe)

        yield {"plain": plain, "learned": learned, "new": lambda: learned(LowRankSet(network, names, rank), two)}
    model.cleanup()


def foreseen_bytes(model: ModelPatcher, module: MotionModule, frames: int, size: tuple[int, int], rank: int,
                   recompute: bool = True) -> int:  # fmt: skip
    """What the node says a step will need. size: of the latents."""
    network = module.patcher.model
    layers = layers_of(model.model.diffusion_model, module.spec, size, frames, model.load_device)
    return run_bytes(lora_size(network, attention_layers(network, ()), rank), layers, frames, 4, recompute)


def estimate_errors(shapes: Shapes = SHAPES, width: int = WIDTH) -> Errors:
    """Of a run of two steps. width: channels of the finest level of a UNet with SD1.5's layout."""
    model, module = small((width, 2 * width, 4 * width, 4 * width), 2, model_channels=width)

    def taken(frames: int, size: tuple[int, int], recompute: bool) -> tuple[int, int]:
        with step_calls(model, module, frames, size, RANK, recompute) as calls:
            measured = peak_bytes(calls["new"])
        return foreseen_bytes(model, module, frames, size, RANK, recompute), measured

    return errors_of(taken, shapes)


def errors_of(taken: Callable[[int, tuple[int, int], bool], tuple[int, int]], shapes: Shapes) -> Errors:
    """Estimate over measured peak, less one, by (frames, height, width, layers computed twice).

    taken: both, in bytes, of frames of a size in latent pixels, with layers computed twice or kept.
    """
    errors = {}
    for frames, *size in shapes:
        for recompute in (True, False):
            found, measured = taken(frames, tuple(size), recompute)
            errors[frames, size[0], size[1], recompute] = found / measured - 1.0
            how = "computed twice" if recompute else "kept"
            print(f"  {frames}x{size[0]}x{size[1]}, layers {how}: estimated {found / 2**20:.1f} MiB, measured "
                  f"{measured / 2**20:.1f} MiB, {found / measured - 1.0:+.1%}", flush=True)  # fmt: skip
    return errors


def step_figures(size: int, frames: int, rank: int, rounds: int, models: Any = None) -> dict[str, float]:
    """Time, FLOPs and memory of a training step over those of the plain UNet's two passes. size: pixels a side.

    models: a MODEL and a motion module in place of SD1.5's published shapes with seeded random weights.
    """
    model, module = models or (image_model(torch.float32), motion_module(torch.float32))
    latent = (size // 8, size // 8)
    foreseen = foreseen_bytes(model, module, frames, latent, rank)
    network = module.patcher.model
    weights = 4 * lora_size(network, attention_layers(network, ()), rank)
    print(f"  {foreseen / 2**20:.0f} MiB foreseen for a step, besides the models", flush=True)
    counts: dict[str, dict[str, int]] = {"plain": {}, "learned": {}}
    with step_calls(model, module, frames, latent, rank) as calls:
        seconds = in_turn({name: first_counted(calls[name], counts[name]) for name in counts}, rounds)
    return {
        "train.step_over_plain": median_ratio(seconds["learned"], seconds["plain"]),
        "train.step_flops_over_plain": counts["learned"]["flops"] / counts["plain"]["flops"],
        "train.step_seconds": min(seconds["learned"]),
        "train.plain_seconds": min(seconds["plain"]),
        "train.step_peak_mib": counts["learned"]["peak"] / 2**20,
        "train.plain_peak_mib": counts["plain"]["peak"] / 2**20,
        # weights are there before, AdamW's two moments after the backward pass of the first step
        "train.step_foreseen_over_peak": (foreseen - 3 * weights) / counts["learned"]["peak"],
    }
