"""Memory of decoding and saving a clip: how much more 2,000 frames need than 64.

Each length runs in a process of its own: Temporal VAE Decode decodes, streaming, from latents that are there already,
while the host's way of saving writes an mp4. The decoder is the demo's VAE, which knows no time, or one of the temporal
ones (SVD's, Reuse and Diffuse's) at a small width; its figures have its name, `decode.svd.rss_2000_over_64` for one.
`decode.rss_2000_over_64` compares the peaks of the process's memory less the latents; a clip that were held would add
12 bytes a pixel, 375 MiB for 2,000 frames of 128 x 128. `decode.rss_grown_mib_*` is what the peak since the decoding
began is above the memory at that time, the sharper of the two; `decode.rss_kept_mib_*` is what the process holds more
when the file is whole.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from ..demo import config
from ..host import demo_models
from ..host.vae import STREAMING, DecodeSettings, decode_video
from ..host.video import StreamedVideo
from ..motion_modules.temporal_vae.checkpoint import Kind
from .side_by_side import device_name, report
from .vaes import THIN, seeded_vae

LENGTHS = (64, 2000)
CHANNELS = 4  # of latents
CHUNK = 8  # frames that are decoded together
KIB = 1024
PACK = Path(__file__).resolve().parent.parent / "scripts" / "pack.py"


def resident_bytes(which: str = "VmRSS") -> int:
    """Resident memory of this process: now, or its peak (VmHWM) since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * KIB
    raise OSError("this system does not tell the memory of a process")


def forget_peak() -> None:
    """Let the peak be counted from now on; before, the host and the networks were loaded."""
    Path("/proc/self/clear_refs").write_text("5")


def demo_vae() -> comfy.sd.VAE:
    """The demo's VAE, untrained: its work does not depend on its weights."""
    network = demo_models.build_vae()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    settings = {"params": {"ddconfig": config.VAE, "embed_dim": config.VAE["z_channels"]}}
    return comfy.sd.VAE(sd=network.state_dict(), config=settings)


DECODERS: dict[str, Callable[[], comfy.sd.VAE]] = {
    "demo": demo_vae,
    "svd": partial(seeded_vae, Kind.SVD, THIN),
    "vidrd": partial(seeded_vae, Kind.VIDRD, THIN),
}


def streamed(decoder: str, frames: int, size: int) -> StreamedVideo:
    """A VIDEO that decodes random latents."""
    samples = {"samples": torch.randn(frames, CHANNELS, size // 8, size // 8)}
    return decode_video(DECODERS[decoder](), samples, Fraction(24), DecodeSettings(STREAMING, CHUNK))


def one_length(decoder: str, frames: int, size: int, folder: Path) -> dict[str, float]:
    """Decode and save one clip in this process."""
    video = streamed(decoder, frames, size)
    streamed(decoder, CHUNK, size).save_to(str(folder / "first.mp4"))  # what an encoder loads once is there before, too
    forget_peak()
    before, start = resident_bytes(), time.monotonic()
    video.save_to(str(folder / "clip.mp4"))
    seconds, peak = time.monotonic() - start, resident_bytes("VmHWM")
    latents = frames * CHANNELS * (size // 8) ** 2 * 4
    kept = resident_bytes() - before
    return {"peak": peak - latents, "grown": peak - before, "kept": kept, "seconds": seconds}


def measure(size: int, decoder: str = "demo") -> dict[str, float]:
    """Both lengths, each in a fresh process."""
    found: dict[int, dict[str, float]] = {}
    for frames in LENGTHS:
        command = [sys.executable, str(PACK), "bench.video", "--length", str(frames), "--size", str(size)]
        command += ["--decoder", decoder]
        out = subprocess.run(command, env=os.environ, check=True, stdout=subprocess.PIPE, text=True).stdout
        line = next(line for line in out.splitlines() if line.startswith("found "))
        found[frames] = dict(zip(("peak", "grown", "kept", "seconds"), map(float, line.split()[1:]), strict=True))
    figures = {f"rss_above_latents_mib_{n}": found[n]["peak"] / KIB**2 for n in LENGTHS}
    figures |= {f"rss_grown_mib_{n}": found[n]["grown"] / KIB**2 for n in LENGTHS}
    figures |= {f"rss_kept_mib_{n}": found[n]["kept"] / KIB**2 for n in LENGTHS}
    figures |= {f"save_frames_per_second_{n}": n / found[n]["seconds"] for n in LENGTHS}
    short, long = (found[n] for n in LENGTHS)
    figures["rss_2000_over_64"] = long["peak"] / short["peak"]
    prefix = "decode." if decoder == "demo" else f"decode.{decoder}."
    return {prefix + name: value for name, value in figures.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench video", description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--decoder", choices=DECODERS, default="demo", help="what decodes")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", help="write the figures to this file")
    arguments: Any = parser.parse_args(argv)
    if arguments.length:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            found = one_length(arguments.decoder, arguments.length, arguments.size, Path(folder))
        print("found", *found.values())
        return 0
    size, decoder = arguments.size, arguments.decoder
    print(f"{LENGTHS[0]} and {LENGTHS[1]} frames of {size} x {size}, decoder {decoder}, to mp4 on {device_name()}")
    report(measure(size, decoder), arguments.json)
    return 0
