"""Reuse and Diffuse on the toy world: the jump at a seam against clips sampled apart, and M, alpha, beta one at a time.

Videos of two clips, made as a graph would make them: in one run, or the second clip later, led by the latents of the
first or by the DDIM inversion of a video that was drawn and not sampled. Read at the seam: the distance of the two
latents and that of the shape's centroids, each also between neighbours inside a clip; and the replay, how far the
second clip's frames that are never led lie from the first clip played backwards, as a share of that without reuse.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.sample
import numpy as np
import torch
from torch import Tensor

from ..demo import config, oracle, world
from ..demo.captions import DIRECTIONS, Words
from ..demo.world import FRAMES
from ..host.invert import Inversion, invert_clip
from ..host.reuse import apply_reuse
from ..sampling.reuse import Guidance, Reuse, States
from ..sampling.travel import Interpolation
from .side_by_side import device_name, report
from .toy import CFG, FIRST_SEED, ONE_WAY, RESTING, THERE_AND_BACK, Bench, captions, there_and_back

STEPS, SAMPLER, SCHEDULER = 12, "euler", "normal"
PAPER = Reuse(FRAMES, FRAMES // 2, 4.0, 0.4)
"""The example of the released code, which leads 4 frames of clips of 8."""
NAIVE = Reuse(FRAMES, 0, 0.0, 0.0)
UP = Inversion(steps=25, keep=FRAMES, check=False)
LATER = {"": PAPER, "_M_4": replace(PAPER, prompt_frames=4)}
"""Settings of clips that are sampled later than the LATENT or video they continue, by the end of a row's name."""
BASELINES = {f"continue_path{end}": "video_naive" for end in LATER}
"""What a row is compared with where that is not `naive`: the same video with a clip sampled apart behind it."""
ABLATION = {"M": ("prompt_frames", (0, 2, 4)), "alpha": ("alpha", (0.0, 1.0, 8.0)), "beta": ("beta", (0.0, 0.2, 0.8))}
PARTS = [*ABLATION, "released", "continue_from", "continue_path"]


@dataclass(frozen=True)
class Video:
    """What is measured of one video of two clips. jump, step: latent distance per value at the seam, inside the clips;
    pixels, pixel_step: the same of the centroids, NaN where a frame could not be read; replay: see the module."""

    jump: float
    step: float
    pixels: float
    pixel_step: float
    replay: float
    caption_right: bool


def settings(only: list[str]) -> Iterator[tuple[str, Reuse]]:
    """Name and settings of every row: naive, the defaults, the released code's form, and one changed at a time."""
    yield "naive", NAIVE
    yield "default", PAPER
    if "released" in only:
        yield "released", replace(PAPER, guidance=Guidance.RELEASED)
    for name in (name for name in ABLATION if name in only):
        field, values = ABLATION[name]
        yield from ((f"{name}_{value:g}", replace(PAPER, **{field: value})) for value in values)


def remembering(model: Any) -> Any:
    """A clone that computes nothing twice: the first clip of a video is the same for every row."""
    model, known = model.clone(), {}

    def call(apply_model: Callable, given: dict) -> Tensor:
        key = (given["input"].cpu().numpy().tobytes(), float(given["timestep"][0]), tuple(given["cond_or_uncond"]))
        if key not in known:
            known[key] = apply_model(given["input"], given["timestep"], **given["c"])
        return known[key].clone()

    model.set_model_unet_function_wrapper(call)
    return model


def sample(bench: Bench, model: Any, positive: Any, noise: Tensor, seed: int) -> Tensor:
    """Latents from noise, (frames, 4, 16, 16)."""
    return comfy.sample.sample(model, noise, STEPS, CFG, SAMPLER, SCHEDULER, positive, bench.encode(""),
                               torch.zeros_like(noise), disable_pbar=True, seed=seed)  # fmt: skip


def noise_of(seed: int) -> Tensor:
    return comfy.sample.prepare_noise(torch.zeros(2 * FRAMES, 4, 16, 16), seed)


def make(bench: Bench, model: Any, words: Words, seed: int, kind: str) -> Tensor:
    """Latents of one video of two clips made in one run, (2 FRAMES, 4, 16, 16)."""
    back = there_and_back(bench, words, 2 * FRAMES, FRAMES, Interpolation.HOLD) if kind == THERE_AND_BACK else None
    return sample(bench, model, back or bench.encode(words.text), noise_of(seed), seed)


def make_later(bench: Bench, model: Any, words: Words, seed: int, kind: str) -> Tensor:
    """Latents of the second clip in a run of its own, from the noise it has in `make`."""
    if kind == THERE_AND_BACK:
        x, y = DIRECTIONS[words.direction]
        words = replace(words, direction=next(name for name, way in DIRECTIONS.items() if way == (-x, -y)))
    return sample(bench, model, bench.encode(words.text), noise_of(seed)[FRAMES:], seed)


def continued(
    bench: Bench, model: Any, words: Words, seed: int, kind: str, naive: Tensor, only: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Name and latents of every video whose second clip goes on from a finished one. naive: the clips sampled apart."""
    first, second = naive.split(FRAMES)
    if "continue_from" in only:
        for end, reuse in LATER.items():
            leading = apply_reuse(model, reuse, {"samples": first})
            yield f"continue_from{end}", torch.cat([first, make_later(bench, leading, words, seed, kind)])
    if "continue_path" in only:
        video = bench.vae.encode(world.draw(world.clip(words, np.random.default_rng(seed))))
        yield "video_naive", torch.cat([video, second])
        path = invert_clip(bench.video(), bench.encode(words.text), {"samples": video}, UP).path
        for end, reuse in LATER.items():
            leading = apply_reuse(model, reuse, path=path)
            yield f"continue_path{end}", torch.cat([video, make_later(bench, leading, words, seed, kind)])


def rows(
    bench: Bench, model: Any, words: Words, seed: int, kind: str, only: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Name and latents, (2 FRAMES, 4, 16, 16), of the video of every row."""
    made = {}
    for name, reuse in settings(only):
        made[name] = make(bench, apply_reuse(model, reuse), words, seed, kind)
        yield name, made[name]
    yield from continued(bench, model, words, seed, kind, made["naive"], only)


def measure(bench: Bench, latents: Tensor, words: Words) -> Video:
    """Decodes two frames on each side of the seam."""
    readings = oracle.read(bench.vae.decode(latents[FRAMES - 2 : FRAMES + 2]))
    centres = np.array([reading.centre for reading in readings])
    moves = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    changes = (latents[1:] - latents[:-1]).square().mean((1, 2, 3)).sqrt()
    inside = torch.cat([changes[: FRAMES - 1], changes[FRAMES:]])
    free = slice(FRAMES // 2, FRAMES)
    replay = (latents[FRAMES:][free] - latents[:FRAMES].flip(0)[free]).square().mean().sqrt()
    right = all(reading.shows(words) for reading in readings)
    return Video(float(changes[FRAMES - 1]), float(inside.mean()), float(moves[1]), float(moves[[0, 2]].mean()),
                 float(replay), right)  # fmt: skip


def mean(videos: list[Video], name: str) -> float:
    values = np.array([getattr(video, name) for video in videos], float)
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")


def seam_ratio(videos: list[Video], naive: list[Video], name: str) -> float:
    """Mean jump over the mean jump of naive continuation, over the videos in which both could be read."""
    pairs = np.array([(getattr(a, name), getattr(b, name)) for a, b in zip(videos, naive, strict=True)])
    pairs = pairs[~np.isnan(pairs).any(1)]
    return float(pairs[:, 0].mean() / pairs[:, 1].mean()) if len(pairs) else float("nan")


def figures_of(videos: list[Video], naive: list[Video]) -> dict[str, float]:
    return {
        "latent": seam_ratio(videos, naive, "jump"),
        "centroid": seam_ratio(videos, naive, "pixels"),
        "jump": mean(videos, "jump"),
        "pixels": mean(videos, "pixels"),
        "replay": seam_ratio(videos, naive, "replay"),
        "caption_right": mean(videos, "caption_right"),
    }


def store_bytes() -> dict[str, float]:
    """Bytes of states kept with the released example, 50 steps and 8 frames of 4 x 32 x 32; and if all were kept."""
    example, whole = Reuse(8, 4, 4.0, 0.4), 50 * 8 * 4 * 32 * 32 * 4
    states = States(example, 50)
    for state in states.counts:
        states.keep(torch.zeros(8, 4, 32, 32), state)
    return {"reuse.store_bytes": float(states.bytes), "reuse.store_share": states.bytes / whole}


COLUMNS = {"latent": "seam/naive", "centroid": "px/naive", "jump": "latent jump", "pixels": "px jump",
           "replay": "replay", "caption_right": "caption"}  # fmt: skip


def table(made: dict[str, list[Video]]) -> str:
    """Rows of settings against what was read, over the videos so far."""
    lines = [f"{'':18}" + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for name, videos in made.items():
        found = figures_of(videos, made[BASELINES.get(name, "naive")])
        lines.append(f"{name:18}" + "".join(f"{found[key]:12.3f}" for key in COLUMNS))
    return "\n".join(lines)


def all_figures(made: dict[str, list[Video]]) -> dict[str, float]:
    figures = store_bytes() | {"reuse.videos": float(len(made["naive"]))}
    for name, videos in made.items():
        found = figures_of(videos, made[BASELINES.get(name, "naive")])
        figures |= {f"reuse.{name}.{key}": value for key, value in found.items()}
    for key in ("latent", "centroid"):
        figures[f"reuse.seam_vs_naive.{key}"] = figures[f"reuse.default.{key}"]
    inside = {"latent": mean(made["default"], "step"), "pixels": mean(made["default"], "pixel_step")}
    return figures | {f"reuse.inside.{key}": value for key, value in inside.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench reuse", description=__doc__)
    parser.add_argument("--clips", type=int, default=12, help="captions and seeds a figure is taken over")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS,
                        help="change only these beside the defaults, or continue only these")  # fmt: skip
    parser.add_argument("--shapes", choices=(RESTING, THERE_AND_BACK, ONE_WAY), default=RESTING,
                        help="what captions ask of them")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=config.WEIGHTS, help="folder of the demo weights")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further video after this time")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    print(f"{arguments.clips} videos of 2 x {FRAMES} frames, {STEPS} steps of {SAMPLER}, cfg {CFG:g};")
    print(f"M {PAPER.prompt_frames}, alpha 4, beta 0.4 but for what a row names; on {device_name()}")
    kind, made, begun = arguments.shapes, dict[str, list[Video]](), time.monotonic()
    with torch.inference_mode():
        bench = Bench.open(arguments.weights)
        for i, words in enumerate(captions("test", kind != RESTING, arguments.clips)):
            if time.monotonic() - begun > arguments.minutes * 60:
                break
            for name, latents in rows(bench, remembering(bench.video()), words, FIRST_SEED + i, kind, arguments.only):
                made.setdefault(name, []).append(measure(bench, latents, words))
            print(f"\nafter {i + 1} videos, {time.monotonic() - begun:.0f} s\n{table(made)}", flush=True)
    report(all_figures(made), arguments.json)
    return 0
