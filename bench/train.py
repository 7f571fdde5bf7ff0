"""MotionLoRAs trained as the node trains them: their motion on the toy world, resuming, and the price of a step.

The motion is learned from drawn stills under a moving camera whose captions say no direction; without a MotionLoRA
shapes of such captions stand still.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from torch import Tensor

from ..demo import config, oracle
from ..demo.world import FRAMES, SIZE
from ..host import paths
from ..host.dataset import STILLS, film_camera
from ..host.inflate import MotionSettings, apply_motion
from ..host.motion import MotionModule, add_motion_lora
from ..host.options import NOISE_LEVELS, lora_training
from ..host.train import train_motion_lora
from ..host.train_words import HALF_NOISIEST
from ..motion_modules.files import read_weights
from ..training.dataset import Dataset
from .camera import CAMERAS, Camera, Clip, stills
from .side_by_side import keep, report
from .toy import FIRST_SEED, SAMPLING, Bench, captions, chosen_sampling, sampling_options
from .train_step import estimate_errors, step_figures

REFERENCES = 48
RECIPE = {
    "rank": 16, "alpha": 16, "steps": 300, "learning_rate": 0.003,
    "frames": FRAMES, "stride": 1, "clip_length": 0, "batch_size": 4, "accumulate": 1, "seed": 0,
    "gradient_checkpointing": False, "save_every": 50, "existing": "go on", "sample_every": 0,
    "high_noise_weight": 200.0,
}  # fmt: skip
OWN = {"zoom_in": {"steps": 600}, "roll": {"steps": 600, "high_noise_weight": 600.0}}
"""What a motion needs besides: a zoom and a roll move every place another way."""
RESUMED = {"steps": 12, "save_every": 100}
BOTH = ("zoom_in", "pan_left")


@dataclass
class Room:
    """The demo models, how many clips are made, the noise levels that are learned at, how many frames a step sees (0:
    all), and the clips so far without a MotionLoRA."""

    bench: Bench
    count: int
    levels: str = HALF_NOISIEST
    seen: int = 0
    still: list[Tensor] = field(default_factory=list)

    def references(self, camera: Camera) -> Dataset:
        """Clips of the camera's move over drawn stills, by Camera Motion Clips."""
        pictures, lines = stills(camera, REFERENCES, seed=1)
        made, _ = film_camera(pictures, lines, motion=camera.move.value, source=STILLS, frames=FRAMES,
                              amount=camera.amount, clips_each=1, width=SIZE, height=SIZE, seed=1)  # fmt: skip
        return made

    def learn(self, name: str, clips: Dataset, **widgets: Any) -> MotionModule:
        """The motion module with a MotionLoRA of this name, by Train MotionLoRA."""
        chosen = {"noise_levels": self.levels, "frames_seen": self.seen}
        how = lora_training(file_name=name, **RECIPE | chosen | OWN.get(name, {}) | widgets)
        bench = self.bench
        return train_motion_lora(bench.unet, bench.motion(), bench.clip, bench.vae, clips, "", how)

    def clips(self, module: MotionModule, count: int = 0) -> list[Tensor]:
        """Clips of unseen captions without a direction. Shapes: each (f, h, w, 3)."""
        model = apply_motion(self.bench.unet, module, MotionSettings(schedule=module.spec.variant.schedule))
        made = []
        for i, words in enumerate(captions("test", False, count or self.count)):
            self.bench.sample(model, words, FIRST_SEED + i, FRAMES)
            made.append(self.bench.last)
        return made

    def without(self) -> list[Tensor]:
        """The clips of the motion module alone, made once."""
        if not self.still:
            start = time.monotonic()
            self.still = self.clips(self.bench.motion())
            print(f"  {self.count} clips without a MotionLoRA ({time.monotonic() - start:.0f} s)", flush=True)
        return self.still


def share(answers: Any) -> float:
    answers = [bool(answer) for answer in answers]
    return sum(answers) / len(answers)


def right(made: list[Clip]) -> float:
    """Share of clips whose every frame has the shape, colour and ground of the caption."""
    asked = captions("test", False, len(made))
    return share(all(reading.shows(words) for reading in clip) for clip, words in zip(made, asked, strict=True))


def weaker(camera: Camera, half: list[Clip], whole: list[Clip], still: list[Clip]) -> dict[str, float]:
    """What strength 0.5 does of what strength 1 does, beyond what is there without: share of clips where it is less,
    and the median over the clips. A clip that cannot be read is none where it is less."""
    effects = np.array([[camera.effect(clip) for clip in clips[: len(half)]] for clips in (half, whole, still)])
    less, more = effects[:2] - effects[2]
    return {"half_is_less": float((np.abs(less) < np.abs(more)).mean()),
            "half_over_whole": float(np.nanmedian(less / more))}  # fmt: skip


def measure_motion(room: Room, name: str) -> dict[str, float]:
    """One MotionLoRA: trained, at full and half strength, and taken away again."""
    camera, start = CAMERAS[name], time.monotonic()
    module = room.learn(name, room.references(camera))
    print(f"  {name}: trained ({time.monotonic() - start:.0f} s)", flush=True)
    few = max(1, room.count // 4)
    still, whole = ([camera.read(clip) for clip in clips] for clips in (room.without(), room.clips(module)))
    weak = add_motion_lora(room.bench.motion(), f"{name}.safetensors", 0.5)
    half = [camera.read(clip) for clip in room.clips(weak, few)]
    again = room.clips(room.bench.motion(), 1)[0]
    nothing = [oracle.Reading()] * FRAMES  # a shape that is nowhere moves by nothing
    figures = {
        "present": share(camera.present(*pair) for pair in zip(whole, still, strict=True)),
        "present_without": share(camera.present(clip, nothing) for clip in still),
        "effect": float(np.nanmedian([camera.effect(clip) for clip in whole])),
        "caption_right": right(whole),
        "caption_right_without": right(still),
        **weaker(camera, half, whole, still),
        "removed_equal": float(torch.equal(again, room.without()[0])),
    }
    if camera.steady:
        figures["monotonic"] = share(camera.steady(clip) for clip in whole)
    return {f"train.lora.{name}.{key}": value for key, value in figures.items()}


def measure_both(room: Room, names: list[str]) -> dict[str, float]:
    """Two MotionLoRAs on one module: each motion is there. They are trained where their files are not there yet."""
    module = room.bench.motion()
    for name in names:
        if not paths.new_file(paths.MOTION_LORAS, name).is_file():
            room.learn(name, room.references(CAMERAS[name]))
        module = add_motion_lora(module, f"{name}.safetensors", 1.0)
    still, made = ([oracle.read(clip) for clip in clips] for clips in (room.without(), room.clips(module)))
    figures = {f"{name}_present": share(CAMERAS[name].present(*pair) for pair in zip(made, still, strict=True))
               for name in names}  # fmt: skip
    where = f"train.lora.{'_and_'.join(names)}"
    return {f"{where}.{key}": value for key, value in (figures | {"caption_right": right(made)}).items()}


def measure_resume(room: Room) -> dict[str, float]:
    """A run that is cancelled half way and taken up again writes what an uninterrupted one writes."""
    clips = room.references(CAMERAS["pan_left"])
    room.learn("whole", clips, **RESUMED)
    with cancelled_at(RESUMED["steps"] // 2, RESUMED["steps"]):
        try:
            room.learn("resumed", clips, **RESUMED)
        except comfy.model_management.InterruptProcessingException:
            print("  resume: cancelled half way", flush=True)
    file = paths.new_file(paths.MOTION_LORAS, "resumed")
    if not file.with_name(f"{file.name}.training").is_file():
        raise RuntimeError(f"The run was not cancelled: {file.parent} holds no state of it.")
    room.learn("resumed", clips, **RESUMED)
    left, both = (read_weights(paths.new_file(paths.MOTION_LORAS, name)) for name in ("whole", "resumed"))
    equal = left.keys() == both.keys() and all(torch.equal(left[key], both[key]) for key in left)
    return {"train.resume_equal": float(equal)}


@contextmanager
def cancelled_at(step: int, steps: int) -> Iterator[None]:
    """While the context lasts, a progress bar of so many steps that comes to `step` makes the user press Cancel.

    Newer hosts do not report every step, so the press may come later, but before the end."""

    def on_progress(value: int, total: int, preview: Any, **node: Any) -> None:
        if total == steps and step <= value < steps:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(on_progress)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def measure(room: Room | None, name: str, args: Any) -> dict[str, float]:
    if name == "step":
        return step_figures(args.size, args.frames, args.rank, args.rounds)
    if name == "estimate":
        return {"train.estimate_error_max": max(map(abs, estimate_errors().values()))}
    if name == "both":
        return measure_both(room, args.both)
    return measure_resume(room) if name == "resume" else measure_motion(room, name)


class Seldom(logging.Filter):
    """Lets a line through at most every quarter of a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        due = time.monotonic() - self.last > 15
        self.last = time.monotonic() if due else self.last
        return due


@contextmanager
def told_now_and_then() -> Iterator[None]:
    """While the context lasts a training says on the terminal how far it is."""
    log, heard = logging.getLogger(__name__.split(".")[0]), logging.StreamHandler(sys.stdout)
    heard.addFilter(Seldom())
    log.addHandler(heard)
    level, log.propagate = log.level, False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
        log.propagate = True


@contextmanager
def files_in(folder: Path | None, kind: str = paths.MOTION_LORAS) -> Iterator[None]:
    """While the context lasts, trained files of a kind go into this folder, or into one that is removed afterwards."""
    with tempfile.TemporaryDirectory() as passing:
        paths.register_folders()
        root = (folder or Path(passing)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(root), is_default=True)
        yield


def main(argv: list[str]) -> int:
    sections = [*CAMERAS, "both", "resume", "step", "estimate"]
    parser = argparse.ArgumentParser(prog="bench train", description=__doc__)
    parser.add_argument("--clips", type=int, default=20, help="seeds and captions a figure of a motion is taken over")
    parser.add_argument("--only", nargs="*", choices=sections, default=sections, help="measure only these")
    parser.add_argument("--weights", type=Path, default=config.WEIGHTS, help="folder of the demo weights")
    parser.add_argument("--out", type=Path, help="folder for the MotionLoRAs; those that are there are not made again")
    parser.add_argument("--both", nargs=2, choices=CAMERAS, default=BOTH, help="both: the motions at once")
    parser.add_argument("--levels", choices=NOISE_LEVELS, default=HALF_NOISIEST, help="noise_levels of the node")
    parser.add_argument("--frames-seen", type=int, default=0, help="frames_seen of the node")
    parser.add_argument("--size", type=int, default=256, help="step: pixels a side")
    parser.add_argument("--frames", type=int, default=16, help="step: frames of a clip")
    parser.add_argument("--rank", type=int, default=64, help="step: rank of the MotionLoRA")
    parser.add_argument("--rounds", type=int, default=1, help="step: rounds timed after one that is not")
    sampling_options(parser, SAMPLING)
    parser.add_argument("--json", help="write the figures to this file, after every section")
    args = parser.parse_args(argv)
    print(f"{args.clips} unseen captions and seeds")
    figures: dict[str, float] = {}
    with torch.inference_mode(), files_in(args.out), told_now_and_then():
        drawn = set(args.only) - {"step", "estimate"}
        bench = Bench.open(args.weights, chosen_sampling(args)) if drawn else None
        room = Room(bench, args.clips, args.levels, args.frames_seen) if bench else None
        for name in args.only:
            start, found = time.monotonic(), measure(room, name, args)
            figures |= found
            keep(figures, args.json)
            said = ", ".join(f"{key.split('.')[-1]} {value:.3f}" for key, value in found.items())
            print(f"  {name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    report(figures, args.json)
    return 0
