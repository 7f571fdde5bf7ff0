"""Temporal VAE Decode on the published SVD decoder: distance to one whole-clip call of the host, time and memory; then
what `bench video` measures: memory of decoding while saving."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..host.vae import EXACT, STREAMING, ClipDecoder, DecodeSettings
from ..motion_modules.temporal_vae.checkpoint import Kind
from . import video
from .side_by_side import device_name, in_turn, median_ratio, peak_bytes, report
from .vaes import seeded_vae

KEPT = 0.95  # correlation of a latent frame with the one before


def moving_clip(frames: int, size: int) -> Tensor:
    """Latents (frames, 4, size, size): smooth in space, each frame a little different from the one before."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(frames, 4, (size + 1) // 2, (size + 1) // 2, generator=generator)
    clip = [noise[0]]
    for fresh in noise[1:]:
        clip.append(KEPT * clip[-1] + (1 - KEPT**2) ** 0.5 * fresh)
    return torch.nn.functional.interpolate(torch.stack(clip), size=(size, size), mode="bilinear")


def measure(frames: int, size: int, chunk: int, rounds: int) -> dict[str, float]:
    vae, latent = seeded_vae(Kind.SVD), moving_clip(frames, size)

    def host(part: Tensor) -> Tensor:
        """One call of the host's decoder on all frames of `part`."""
        comfy.model_management.load_models_gpu([vae.patcher])
        pixels = vae.first_stage_model.decode(part.to(vae.device, vae.vae_dtype)).float()
        return vae.process_output(pixels).movedim(1, -1).cpu()

    def ours(mode: str, n: int = chunk) -> Callable[[], Tensor]:
        return lambda: torch.cat(list(ClipDecoder(vae, DecodeSettings(mode, n)).frames(latent)))

    calls = {"host": lambda: host(latent), "exact": ours(EXACT), "streaming": ours(STREAMING)}
    made = {name: call() for name, call in calls.items()}
    whole = made["host"]
    cut = torch.cat([host(part) for part in latent.split(14)])
    figures = {
        "decode.exact_error": (made["exact"] - whole).abs().max().item(),
        "decode.streaming_error": (made["streaming"] - whole).abs().mean().item(),
        "decode.streaming_error_max": (made["streaming"] - whole).abs().max().item(),
        "decode.host_cut_at_14_error": (cut - whole).abs().mean().item(),
        "decode.pixel_deviation": whole.std().item(),
        "decode.streaming_chunk_error": (ours(STREAMING, 1)() - made["streaming"]).abs().max().item(),
    }
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    figures |= {f"decode.{name}_peak_mib": peak / 2**20 for name, peak in peaks.items()}
    if rounds:
        seconds = in_turn(calls, rounds)
        figures["decode.time_vs_host"] = median_ratio(seconds["exact"], seconds["host"])
        figures["decode.streaming_time_vs_host"] = median_ratio(seconds["streaming"], seconds["host"])
        figures |= {f"decode.{name}_seconds": min(values) for name, values in seconds.items()}
    return figures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench decode", description=__doc__)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=8, help="latent pixels a side; a frame has eight times as many")
    parser.add_argument("--chunk", type=int, default=DecodeSettings.chunk, help="frames worked on at once")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; 0: no timing")
    parser.add_argument("--saved", type=int, default=32, help="pixels a side of saved clips; 0 for none")
    parser.add_argument("--json", help="write the figures to this file")
    args: Any = parser.parse_args(argv)
    print(f"{args.frames} frames of {args.size * 8} pixels in chunks of {args.chunk} on {device_name()}")
    with torch.inference_mode():
        figures = measure(args.frames, args.size, args.chunk, args.rounds)
    if args.saved:
        figures |= video.measure(args.saved)
    report(figures, args.json)
    return 0
