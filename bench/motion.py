"""Motion module on full-size SD1.5: time over the plain UNet, against diffusers, and peak memory."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules import attention as host_attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..host.inflate import ATTENTION, MotionSettings, apply_motion
from ..host.motion import MotionModule, manage
from ..motion_modules.animatediff.checkpoint import MotionFile
from ..motion_modules.animatediff.network import MotionModel, sinusoid
from ..motion_modules.animatediff.spec import V2, MotionSpec
from .side_by_side import device_name, in_turn, median_ratio, peak_bytes, report

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "num_heads": 8,
    "num_head_channels": -1, "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "adm_in_channels": None, "use_temporal_attention": False, "use_temporal_resblock": False,
}
WIDTHS = (320, 640, 1280, 1280)
ATTENTIONS = ("pytorch", "sub_quad")


def sd15_spec() -> MotionSpec:
    """Layout of mm_sd_v15_v2."""
    slots = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(WIDTHS) for j in range(2)]
    slots += [("mid_block.motion_modules.0", WIDTHS[-1])]
    slots += [(f"up_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(reversed(WIDTHS)) for j in range(3)]
    return MotionSpec(V2, tuple(slots), 32)


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Seeded weights that keep activations finite through the whole network."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
        else:
            values = 1.0 + 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values)


def image_model(dtype: torch.dtype, layout: dict[str, Any] | None = None) -> comfy.model_patcher.ModelPatcher:
    config = comfy.supported_models.SD15(layout or SD15)
    config.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    base = comfy.model_base.BaseModel(config)
    fill(base.diffusion_model, 0)
    base.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(base, device, comfy.model_management.unet_offload_device())


def motion_module(dtype: torch.dtype) -> MotionModule:
    network = MotionModel(sd15_spec(), dtype=dtype)
    fill(network, 1)
    return manage(MotionFile(sd15_spec(), network.state_dict()), "seeded v2")


def denoise_call(model: comfy.model_patcher.ModelPatcher, x: Tensor, context: Tensor, attention: str = ""
                 ) -> Callable[[], Tensor]:  # fmt: skip
    """One call of the host's model on all frames, with everything a sampler would pass along.

    attention: of the host's functions, the one for the image model's attention; empty for the host's choice.
    """
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "cond_or_uncond": [0]}
    if attention:
        chosen = getattr(host_attention, f"attention_{attention}")
        options[ATTENTION] = lambda function, *args, **kwargs: chosen(*args, **kwargs)
    sigma = torch.full((x.shape[0],), 5.0, device=x.device)
    return lambda: model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=dict(options))


def diffusers_call(model: comfy.model_patcher.ModelPatcher, module: MotionModule, x: Tensor,
                   context: Tensor) -> Callable[[], Tensor]:
    """The same weights in diffusers' UNetMotionModel; they are shared, not copied."""
    from diffusers import UNetMotionModel

    host = model.model.diffusion_model.state_dict()
    weights = {theirs: host[ours] for theirs, ours in comfy.utils.unet_to_diffusers(SD15).items() if ours in host}
    for key, tensor in module.patcher.model.named_parameters():
        name = key.replace(".temporal_transformer.", ".").replace("attention_blocks.0.", "attn1.")
        name = name.replace("attention_blocks.1.", "attn2.").replace("ff_norm.", "norm3.")
        weights[name.replace("norms.0.", "norm1.").replace("norms.1.", "norm2.")] = tensor
    with torch.device("meta"):
        unet = UNetMotionModel(cross_attention_dim=768, motion_max_seq_length=32, use_motion_mid_block=True)
    for key, table in unet.state_dict().items():
        if key.endswith("pos_embed.pe"):
            weights[key] = sinusoid(torch.arange(table.shape[1]), table.shape[2])[None].to(x)
    unet.load_state_dict(weights, assign=True, strict=True)
    unet.eval()
    clip = x.transpose(0, 1)[None]
    time = torch.tensor([600], device=x.device)
    return lambda: unet(clip, time, context).sample


def measure(size: int, frames: int, rounds: int, dtype: torch.dtype, attention: dict[str, str],
            against_diffusers: bool) -> dict[str, float]:  # fmt: skip
    plain = image_model(dtype)
    module = motion_module(dtype)
    video = apply_motion(plain, module, MotionSettings())
    comfy.model_management.load_models_gpu([video, module.patcher], force_full_load=True)
    device = plain.load_device
    x = torch.randn(frames, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(2)).to(device)
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    context = context.expand(frames, -1, -1).contiguous()
    models = {"plain": plain, "motion": video}
    calls = {name: denoise_call(model, x, context, attention[name]) for name, model in models.items()}
    if against_diffusers:
        calls["diffusers"] = diffusers_call(plain, module, x.to(dtype), context)
    flops = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            denoise_call(model, x, context, attention["plain"])()
        flops[name] = counter.get_total_flops()
    figures = {"motion.flops_ratio": (flops["motion"] - flops["plain"]) / flops["plain"]}
    peaks = {name: peak_bytes(calls[name]) for name in models}
    figures["motion.peak_vs_unet"] = peaks["motion"] / peaks["plain"]
    figures["motion.peak_mib"] = peaks["motion"] / 2**20
    gc.collect()
    seconds = in_turn(calls, rounds)
    overhead = median_ratio(seconds["motion"], seconds["plain"]) - 1.0
    figures["motion.plain_seconds"] = min(seconds["plain"])
    figures["motion.motion_seconds"] = min(seconds["motion"])
    figures["motion.overhead"] = overhead
    figures["motion.overhead_over_flops"] = overhead / figures["motion.flops_ratio"]
    if against_diffusers:
        figures["motion.time_vs_diffusers"] = median_ratio(seconds["motion"], seconds["diffusers"])
        figures["motion.diffusers_seconds"] = min(seconds["diffusers"])
    return figures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench motion", description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--without-diffusers", action="store_true")
    parser.add_argument("--attention", nargs=2, choices=ATTENTIONS, default=("pytorch", "pytorch"),
                        help="of the image model without the module, and with it: a CPU host takes sub_quad by itself, "
                        "and pytorch where image_attention of Apply Motion Module says so")  # fmt: skip
    parser.add_argument("--json", help="write the figures to this file")
    args: Any = parser.parse_args(argv)
    print(f"{args.size}x{args.size}x{args.frames} {args.dtype} on {device_name()}, {args.rounds} rounds in turn")
    with torch.inference_mode():
        attention = dict(zip(("plain", "motion"), args.attention, strict=True))
        figures = measure(args.size, args.frames, args.rounds, getattr(torch, args.dtype), attention,
                          not args.without_diffusers)  # fmt: skip
    report(figures, args.json)
    return 0
