"""Attention over frames beside convolutions over frames, both trained anew and alike on moving shapes of the toy world.

The ablation of the AnimateDiff paper: there convolutions made all frames alike. Shapes of the references go to the
right, captions say no direction; read off the clips is whether frames agree on one shape, and whether it goes anywhere.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..demo import config, oracle
from ..host import paths
from ..host.motion import MotionModule
from ..host.options import CONVOLUTION_LAYOUT, V3_LAYOUT, module_training
from ..host.train_stages import train_motion_module
from ..media.clip import collect_pictures
from ..training.dataset import Dataset
from .camera import CAMERAS, Clip, slide
from .side_by_side import device_name, report
from .toy import PLAIN_SAMPLING, Bench
from .train import RECIPE, Room, files_in, right, share, told_now_and_then

CAMERA = CAMERAS["pan_left"]
LAYOUTS = {"attention": V3_LAYOUT, "convolution": CONVOLUTION_LAYOUT}
ANEW = {key: value for key, value in RECIPE.items() if key not in ("rank", "alpha")} | {
    "learning_rate": 0.0012, "batch_size": 1, "accumulate": 4,
}  # fmt: skip


def learn(room: Room, name: str, clips: Dataset, **widgets: Any) -> MotionModule:
    """A new motion module of one layout, by Train Motion Module."""
    how = module_training(file_name=name, layout=LAYOUTS[name], **ANEW | widgets)
    return train_motion_module(room.bench.unet, room.bench.clip, room.bench.vae, clips, "", how)


def judge(made: list[Tensor]) -> dict[str, float]:
    """What clips (f, h, w, 3) show. alike: of clips, all frames have one shape, colour and ground. present: of clips,
    their shape goes as those of the references. slide: pixels, median of those that can be read. change: mean distance
    of the first frame and the last, in [0, 1]."""
    clips = [oracle.read(clip) for clip in made]
    nothing = [oracle.Reading()] * len(clips[0])  # a shape that is nowhere moves by nothing
    return {
        "alike": share(alike(clip) for clip in clips),
        "present": share(CAMERA.present(clip, nothing) for clip in clips),
        "slide": float(np.nanmedian([slide(clip) for clip in clips])),
        "change": float(np.mean([(clip[0] - clip[-1]).abs().mean() for clip in made])),
        "caption_right": right(clips),
    }


def alike(clip: Clip) -> bool:
    """Whether all frames can be read and show one shape in one colour over one ground."""
    faulty = any(reading.fault for reading in clip)
    return not faulty and len({(reading.shape, reading.colour, reading.ground) for reading in clip}) == 1


def measure(room: Room, layout: str, clips: Dataset) -> dict[str, float]:
    start = time.monotonic()
    module = learn(room, layout, clips)
    print(f"  {layout}: trained ({time.monotonic() - start:.0f} s)", flush=True)
    size = sum(tensor.numel() for tensor in module.patcher.model.state_dict().values())
    return {"parameters": size, **judge(room.clips(module))}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench layouts", description=__doc__)
    parser.add_argument("--clips", type=int, default=10, help="seeds and captions a figure is taken over")
    parser.add_argument("--only", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), help="measure only these")
    parser.add_argument("--weights", type=Path, default=config.WEIGHTS, help="folder of the demo weights")
    parser.add_argument("--out", type=Path, help="folder for the motion modules; those that are there stay")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    print(f"{args.clips} unseen captions and seeds, {ANEW['steps']} steps of training, on {device_name()}")
    with torch.inference_mode(), files_in(args.out, paths.MOTION_MODULES), told_now_and_then():
        room = Room(Bench.open(args.weights, PLAIN_SAMPLING), args.clips)
        references = room.references(CAMERA)
        shown = judge([collect_pictures(film.clip) for film in references.films[: args.clips]])
        figures = {f"layouts.references.{key}": shown[key] for key in ("alike", "present", "slide", "change")}
        for name in args.only:
            figures |= {f"layouts.{name}.{key}": value for key, value in measure(room, name, references).items()}
    report(figures, args.json)
    return 0
