"""How well the memory of a UNet call and of decoding is foreseen, and whether a long clip needs more than one window.

The UNet has SD1.5's layout at a fifth of its width, the decoders the published layout at half of theirs. The errors are
of the bytes alive at once beyond the weights; the ratio is the largest call of a long clip's sampling step in windows
over the largest of a clip of one window.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..host import temporal_vae
from ..host.bounds import Bounds
from ..host.context import SlidingContext, apply_context
from ..host.inflate import KEY, MotionSettings, apply_motion
from ..host.memory import slab_bytes
from ..host.motion import MotionModule, manage
from ..host.vae import EXACT, STREAMING, ClipDecoder, DecodeSettings
from ..motion_modules.animatediff.checkpoint import MotionFile
from ..motion_modules.animatediff.network import MotionModel
from ..motion_modules.animatediff.spec import V2, MotionSpec
from ..motion_modules.temporal_vae.checkpoint import Kind, Widths
from .motion import SD15, denoise_call, fill, image_model
from .side_by_side import device_name, peak_bytes, report
from .vaes import seeded_vae

WIDTH = 64
CONTEXT = 64  # numbers of a token of a caption
HALF = Widths(64, (1, 2, 4, 4), 2, 4, 4)
Case = tuple[str, str, int, tuple[int, int, int]]
CASES: tuple[Case, ...] = (
    ("svd", EXACT, 1, (24, 4, 8)), ("svd", EXACT, 4, (6, 8, 6)), ("svd", STREAMING, 4, (100, 4, 4)),
    ("vidrd", EXACT, 2, (20, 4, 4)), ("vidrd", STREAMING, 1, (100, 4, 4)), ("vidrd", STREAMING, 8, (100, 4, 4)),
    ("image", EXACT, 4, (24, 4, 8)), ("image", STREAMING, 2, (6, 8, 6)),
)  # fmt: skip
SHAPES = ((8, 8, 8), (16, 16, 16), (24, 16, 24), (4, 32, 32), (16, 24, 24))  # frames, height, width
TWO_LEVELS = {
    "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip


def small(levels: tuple[int, ...], layers: int, **changes: Any) -> tuple[ModelPatcher, MotionModule]:
    """An image model of the host's class with `levels[0]` channels and a motion module for it, seeded weights."""
    config = {**SD15, "model_channels": levels[0], "context_dim": CONTEXT, **changes}
    slots = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(levels) for j in range(layers)]
    slots += [("mid_block.motion_modules.0", levels[-1])]
    slots += [(f"up_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(levels[::-1]) for j in range(layers + 1)]
    spec = MotionSpec(V2, tuple(slots), 32)
    network = MotionModel(spec)
    fill(network, 1)
    return image_model(torch.float32, config), manage(MotionFile(spec, network.state_dict()), "seeded v2")


def context_of(frames: int) -> torch.Tensor:
    return torch.randn(1, 77, CONTEXT, generator=torch.Generator().manual_seed(3)).expand(frames, -1, -1)


def estimate_errors(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> dict[tuple[int, int, int], float]:
    """Estimate over measured peak of one call, less one, by (frames, height, width)."""
    plain, module = small((WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH), 2)
    video = apply_motion(plain, module, MotionSettings())
    comfy.model_management.load_models_gpu([video, module.patcher], force_full_load=True)
    bounds, errors = bounds_of(video), {}
    for shape in shapes:
        x = torch.randn(shape[0], 4, *shape[1:], generator=torch.Generator().manual_seed(2)).to(plain.load_device)
        measured = peak_bytes(denoise_call(video, x, context_of(shape[0]).to(x.device)))
        found = bounds.footprint(plain.model, x.shape, slab_bytes(x.device), shape[0])
        errors[shape] = found.peak / measured - 1.0
        foreseen, unet, motion, true = (size / 2**20 for size in (found.peak, found.unet, found.motion, measured))
        print(f"  {'x'.join(map(str, shape)):12} estimated {foreseen:8.1f} MiB (UNet {unet:.1f}, motion {motion:.1f}), "
              f"measured {true:8.1f} MiB, {errors[shape]:+.1%}", flush=True)  # fmt: skip
    return errors


def decode_errors(cases: Sequence[Case] = CASES, widths: Widths = HALF) -> dict[Case, float]:
    """Estimate over measured peak of decoding a clip, less one, by (decoder, mode, frames at once, shape)."""
    vaes, errors = {name: build(widths) for name, build in DECODERS.items()}, {}
    for case in cases:
        name, mode, chunk, (frames, height, width) = case
        latent = torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(2))
        decoder = ClipDecoder(vaes[name], DecodeSettings(mode, chunk))
        comfy.model_management.load_models_gpu([decoder.vae.patcher], force_full_load=True)
        measured = peak_bytes(partial(deque, decoder.frames(latent), 0))
        foreseen = decoder.bytes_needed(latent, chunk)
        errors[case] = foreseen / measured - 1.0
        shown = f"{name} {mode}, {chunk} of {frames}x{height}x{width}"
        print(f"  {shown:32} estimated {foreseen / 2**20:8.1f} MiB, measured {measured / 2**20:8.1f} MiB, "
              f"{errors[case]:+.1%}", flush=True)  # fmt: skip
    return errors


def image_vae(widths: Widths) -> comfy.sd.VAE:
    """A VAE of the same build that knows no time, weights as they come."""
    settings = temporal_vae.decoder_settings(widths)
    return comfy.sd.VAE(sd={}, config={"params": {"ddconfig": settings, "embed_dim": widths.embedding}})


DECODERS: dict[str, Callable[[Widths], comfy.sd.VAE]] = {
    "svd": partial(seeded_vae, Kind.SVD), "vidrd": partial(seeded_vae, Kind.VIDRD), "image": image_vae,
}  # fmt: skip


def bounds_of(video: ModelPatcher) -> Bounds:
    return video.get_wrappers(WrappersMP.PREPARE_SAMPLING, KEY)[0].__self__


def largest_call(video: ModelPatcher, frames: int, size: int) -> int:
    """Most bytes that one UNet call holds beyond what was there before it, over one sampling step."""
    peaks: list[int] = []

    def watched(executor: Callable, *args: Any, **kwargs: Any) -> Any:
        out: list[Any] = []
        peaks.append(peak_bytes(lambda: out.append(executor(*args, **kwargs))))
        return out[0]

    model = video.clone()
    model.wrappers[WrappersMP.APPLY_MODEL] = {"bench": [watched], **model.wrappers[WrappersMP.APPLY_MODEL]}
    latent = torch.zeros(frames, 4, size, size)
    text = [[context_of(1), {}]]
    noise = comfy.sample.prepare_noise(latent, 0)
    comfy.sample.sample(model, noise, 1, 1.0, "euler", "normal", text, text, latent, seed=0, disable_pbar=True)
    return max(peaks)


def long_over_window(frames: int, size: int) -> float:
    plain, module = small((32, 64), 1, **TWO_LEVELS)
    context = SlidingContext()
    video = apply_context(apply_motion(plain, module, MotionSettings()), context)
    window = largest_call(video, context.plan.length, size)
    return largest_call(video, frames, size) / window


def shapes_of(text: str) -> tuple[tuple[int, int, int], ...]:
    """Shapes as the command line names them: frames, height and width in latent pixels."""
    return tuple(tuple(map(int, shape.split("x"))) for shape in text.split(","))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench memory", description=__doc__)
    parser.add_argument("--shapes", type=shapes_of, default=SHAPES, help="of the estimate: 4x16x16,8x8x8 for instance")
    parser.add_argument("--frames", type=int, default=1000, help="frames of the long clip; 0 leaves it out")
    parser.add_argument("--size", type=int, default=64, help="latent pixels a side of the long clip")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    size = f"{args.size}x{args.size}"
    print(f"{len(args.shapes)} shapes, then {args.frames} frames of {size} latents, on {device_name()}")
    with torch.inference_mode():
        figures = {"memory.estimate_error_max": max(map(abs, estimate_errors(args.shapes).values()))}
        figures["memory.decode_error_max"] = max(map(abs, decode_errors().values()))
        if args.frames:
            figures["memory.long_over_window"] = long_over_window(args.frames, args.size)
    report(figures, args.json)
    return 0
