"""How long clips hold together where the windows of Sliding Context meet, beside separate clips butted together.

Clips of 96 frames from the demo's module of 16. A border is where the windows that see a frame are others than those
that see the frame before, at the last sampling step. A jump is the way of the shape's centre from one frame to the
next; the ratio is the largest jump at a border over the median jump elsewhere, its median over the clips.

Captions say no direction: a window does what the clips did that the module learned from, so a shape that is to go
somewhere goes all of its way in 16 frames, and in 96 it would leave the picture. Measured as well: shapes that Prompt
Travel lets go there and back, a way for each window, and one direction throughout, for which there is no right clip.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ..demo import config, oracle, world
from ..demo.captions import Words
from ..host.context import SlidingContext, apply_context
from ..sampling.fuse import FuseMethod
from ..sampling.noise import NoiseKind
from ..sampling.travel import Interpolation
from ..sampling.windows import Window, WindowPlan, WindowSchedule
from .side_by_side import report
from .toy import (
    FIRST_SEED,
    ONE_WAY,
    PLAIN_SAMPLING,
    THERE_AND_BACK,
    Bench,
    captions,
    chosen_sampling,
    sampling_options,
    there_and_back,
)

Clip = tuple[Words, list[oracle.Reading]]
WAYS = (THERE_AND_BACK, ONE_WAY)
CONTEXT = SlidingContext(WindowPlan(overlap=8), noise=NoiseKind.SHUFFLED)
"""As the node comes, but with half of each window shared: with a quarter shapes stand less firmly."""
BAR = 1.5  # times the median jump elsewhere
STEADY = 0.25  # pixels by which a centre read off the drawn edge may be wrong; less is rest


def borders(windows: list[Window], frames: int) -> set[int]:
    """Frames f > 0 that some window sees without f - 1, or the other way round."""
    seen = [{number for number, window in enumerate(windows) if f in set(window)} for f in range(frames)]
    return {f for f in range(1, frames) if seen[f] != seen[f - 1]}


def seam_ratio(readings: list[oracle.Reading], seams: set[int]) -> float:
    """Largest jump into a frame of `seams` over the median jump into any other.

    A lost shape counts as a jump across the picture at a seam, and does not count elsewhere. Elsewhere STEADY is the
    least.
    """
    centres = np.array([reading.centre for reading in readings])
    jumps = np.hypot(*np.diff(centres, axis=0).T)
    at_seam = np.array([frame in seams for frame in range(1, len(readings))])
    elsewhere = jumps[~at_seam & np.isfinite(jumps)]
    largest = np.nan_to_num(jumps[at_seam], nan=float(world.SIZE)).max()
    return float(largest / max(np.median(elsewhere) if len(elsewhere) else 0.0, STEADY))


def judge(made: list[Clip], seams: set[int]) -> dict[str, float]:
    """Shape and colour right in every frame; how far the shape jumps where windows meet, and in how many clips that is
    within the bar."""
    right = [all((r.shape, r.colour) == (w.shape, w.colour) and not r.fault for r in readings) for w, readings in made]
    ratios = [seam_ratio(readings, seams) for _, readings in made]
    return {
        "caption_right": float(np.mean(right)),
        "seam_ratio": float(median(ratios)),
        "within_bar": float(np.mean([ratio <= BAR for ratio in ratios])),
    }


def long_clips(bench: Bench, context: SlidingContext, count: int, frames: int, kind: str = "") -> list[Clip]:
    """Clips sampled in windows, one unseen caption and seed each."""
    model, made = apply_context(bench.video(), context), []
    for i, words in enumerate(captions("test", kind in WAYS, count)):
        hop = context.plan.length - context.plan.overlap
        positive = there_and_back(bench, words, frames, hop, Interpolation.LINEAR) if kind == THERE_AND_BACK else None
        made.append((words, bench.sample(model, words, FIRST_SEED + i, frames, positive)))
    return made


def butted_clips(bench: Bench, length: int, count: int, frames: int) -> list[Clip]:
    """As many frames of the same caption from separate clips, each with a seed of its own, end to end."""
    model, made = bench.video(), []
    for i, words in enumerate(captions("test", False, count)):
        parts = [bench.sample(model, words, FIRST_SEED + 1000 * part + i, length) for part in range(frames // length)]
        made.append((words, [reading for readings in parts for reading in readings]))
    return made


def seams_of(bench: Bench, plan: WindowPlan, frames: int) -> set[int]:
    return borders(plan.windows(frames, bench.sampling.steps - 1), frames)


def measure(bench: Bench, context: SlidingContext, count: int, frames: int, ways: bool) -> dict[str, float]:
    """Sliding Context, separate clips, and Sliding Context with other captions where `ways` are asked for."""
    length, seams = context.plan.length, seams_of(bench, context.plan, frames)
    made = {
        "": judge(long_clips(bench, context, count, frames), seams),
        "naive_": judge(butted_clips(bench, length, count, frames), set(range(length, frames, length))),
    }
    few, kinds = max(1, count // 4), WAYS if ways else ()
    made |= {f"{kind}.": judge(long_clips(bench, context, few, frames, kind), seams) for kind in kinds}
    return {f"context.{kind}{name}": value for kind, found in made.items() for name, value in found.items()}


def compare(bench: Bench, count: int, frames: int) -> dict[str, float]:
    """Every schedule with every fuse method, every kind of noise and another overlap, printed as a table."""
    every = itertools.product(WindowSchedule, FuseMethod)
    rows = [replace(CONTEXT, plan=replace(CONTEXT.plan, schedule=schedule), fuse=fuse) for schedule, fuse in every]
    rows += [replace(CONTEXT, noise=kind) for kind in NoiseKind if kind is not CONTEXT.noise]
    rows += [replace(CONTEXT, plan=WindowPlan())]
    figures = {}
    heads = ("schedule", "fuse", "noise", "overlap")
    print("  " + " ".join(f"{head:18}" for head in heads) + f"{'caption right':>14} {'seam ratio':>12} {'seconds':>8}")
    for row in rows:
        start = time.monotonic()
        names = (row.plan.schedule.value, row.fuse.value, row.noise.value, f"overlap {row.plan.overlap}")
        found = judge(long_clips(bench, row, count, frames), seams_of(bench, row.plan, frames))
        shown = f"{found['caption_right']:14.2f} {found['seam_ratio']:12.2f} {time.monotonic() - start:8.0f}"
        print("  " + " ".join(f"{name:18}" for name in names) + shown, flush=True)
        prefix = ".".join(name.replace(" ", "_").replace("-", "_") for name in names)
        figures |= {f"context.{prefix}.{name}": value for name, value in found.items()}
    return figures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench context", description=__doc__)
    parser.add_argument("--clips", type=int, default=10, help="long clips the three figures are taken over")
    parser.add_argument("--table-clips", type=int, default=1, help="and each row of the table; 0 leaves it out")
    parser.add_argument("--frames", type=int, default=96, help="frames of a long clip, a multiple of 16")
    parser.add_argument("--overlap", type=int, default=CONTEXT.plan.overlap, help="frames two windows share")
    parser.add_argument("--ways", action=argparse.BooleanOptionalAction, default=True, help="shapes that move, too")
    parser.add_argument("--weights", type=Path, default=config.WEIGHTS, help="folder of the demo weights")
    sampling_options(parser, PLAIN_SAMPLING)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    print(f"{args.clips} clips of {args.frames} frames")
    with torch.inference_mode():
        bench = Bench.open(args.weights, chosen_sampling(args))
        context = replace(CONTEXT, plan=replace(CONTEXT.plan, overlap=args.overlap))
        figures = measure(bench, context, args.clips, args.frames, args.ways) if args.clips else {}
        if args.table_clips:
            figures |= compare(bench, args.table_clips, args.frames)
    report(figures, args.json)
    return 0
