"""How well the demo models do what their captions say, read off their pictures and clips by demo/oracle.py.

Everything is made as a graph would make it: the host's text encoding, sampler and decoding, the pack's motion modules,
MotionLoRAs through the motion module, the domain adapter through the host's LoRA loader.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch

from ..demo import config, oracle
from ..demo.captions import DIRECTIONS, Words, sentences
from ..demo.world import FRAMES
from ..host import demo_models
from ..host.inflate import MotionSettings, apply_motion
from ..host.motion import MotionModule, manage, patch_motion_lora
from ..host.travel import encode_travel, read_travel
from ..motion_modules.animatediff.checkpoint import read_motion_module
from ..motion_modules.animatediff.lora import read_motion_lora
from ..motion_modules.files import read_weights
from ..sampling.travel import Interpolation
from .side_by_side import device_name, keep, report

FIRST_SEED = 900_000  # no training sample is drawn from a seed like it
CFG = 2.0
TOLD_EVERY = 60.0  # seconds between two lines about how far a section is


@dataclass(frozen=True)
class Sampling:
    """How clips are made: names of the host, and steps of the sampler."""

    sampler: str
    scheduler: str
    steps: int

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.sampler} ({self.scheduler}), cfg {CFG:g}"


SAMPLING = Sampling("dpmpp_2m_sde", "karras", 20)
"""Noise in every step lets a clip that has begun to fade from one shape into another settle for one of them after all;
most of the steps are at low noise, where sizes tremble."""
PLAIN_SAMPLING = Sampling("dpmpp_2m", "normal", 12)
"""What long clips and the layouts of motion modules were measured with."""
Made = list[tuple[Words, list[oracle.Reading]]]
"""What was asked of each clip, and what its frames show."""
RESTING, THERE_AND_BACK, ONE_WAY = "resting", "there_and_back", "one_way"
"""What shapes are asked to do in videos longer than the clips the motion module learned from."""


@dataclass
class Bench:
    """The demo models, loaded from one folder, and the host's sampler and scheduler that clips are made with."""

    folder: Path
    unet: Any
    clip: Any
    vae: Any
    sampling: Sampling = SAMPLING

    @classmethod
    def open(cls, folder: Path, sampling: Sampling = SAMPLING) -> Bench:
        loaders = (demo_models.load_unet, demo_models.load_clip, demo_models.load_vae)
        return cls(folder, *(load(folder) for load in loaders), sampling)

    def motion(self, lora: str | None = None) -> MotionModule:
        path = self.folder / config.MOTION_FILE
        module = manage(read_motion_module(read_weights(path), path.name), path.name)
        if lora is None:
            return module
        path = self.folder / lora
        return patch_motion_lora(module, read_motion_lora(read_weights(path), path.name), 1.0)

    def video(self, model: Any = None, lora: str | None = None) -> Any:
        """The image MODEL with the demo's motion module on it, in its own noise schedule."""
        module = self.motion(lora)
        return apply_motion(model or self.unet, module, MotionSettings(schedule=module.spec.variant.schedule))

    def adapted(self) -> Any:
        """The image MODEL with the domain adapter, through the host's LoRA loader."""
        lora = comfy.utils.load_torch_file(str(self.folder / config.ADAPTER_FILE), safe_load=True)
        return comfy.sd.load_lora_for_models(self.unet, None, lora, 1.0, 0.0)[0]

    def encode(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def sample(self, model: Any, words: Words, seed: int, frames: int, positive: Any = None) -> list[oracle.Reading]:
        """Make `frames` pictures of one caption, or of other CONDITIONING, in one batch and read them."""
        latent = torch.zeros(frames, 4, 16, 16)
        positive, negative = self.encode(words.text) if positive is None else positive, self.encode("")
        noise = comfy.sample.prepare_noise(latent, seed)
        how = (self.sampling.steps, CFG, self.sampling.sampler, self.sampling.scheduler)
        latent = comfy.sample.sample(model, noise, *how, positive, negative, latent, disable_pbar=True, seed=seed)
        self.last = self.vae.decode(latent)
        return oracle.read(self.last)


def captions(split: str, moving: bool, count: int) -> list[Words]:
    """`count` captions of a split, in an order that mixes its words."""
    every = sentences(split, moving)
    order = np.random.default_rng(FIRST_SEED).permutation(len(every))
    return [every[order[i % len(every)]] for i in range(count)]


def there_and_back(bench: Bench, words: Words, frames: int, hop: int, between: Interpolation) -> Any:
    """CONDITIONING of a caption and the one with the opposite direction, in turn, `hop` frames each."""
    ahead = DIRECTIONS[words.direction]
    (back,) = (name for name, way in DIRECTIONS.items() if way == tuple(-part for part in ahead))
    ways = (words, replace(words, direction=back))
    lines = (f"{frame}: {ways[number % 2].text}" for number, frame in enumerate(range(0, frames, hop)))
    return encode_travel(bench.clip, read_travel("\n".join(lines), between.value))


def images(bench: Bench, split: str, count: int) -> dict[str, float]:
    """Share of pictures whose shape, colour and ground are the caption's, captions with and without directions."""
    both = captions(split, False, (count + 1) // 2) + captions(split, True, count // 2)
    readings = [bench.sample(bench.unet, words, FIRST_SEED + i, 1)[0] for i, words in enumerate(both)]
    return {"image.caption_right": _share(r.shows(w) for r, w in zip(readings, both, strict=True))}


def clips(bench: Bench, model: Any, split: str, count: int, moving: bool = True) -> Made:
    """Make and read clips of the captions of a split, and say now and then how many there are."""
    made, told = [], time.monotonic()
    for i, words in enumerate(captions(split, moving, count)):
        made.append((words, bench.sample(model, words, FIRST_SEED + i, FRAMES)))
        if time.monotonic() - told >= TOLD_EVERY:
            told = time.monotonic()
            print(f"    {len(made)} of {count} clips", flush=True)
    return made


def judge(made: Made) -> dict[str, float]:
    """Every frame shows the caption; the shape goes the caption's way; how straight it goes (median R2)."""
    paths = [oracle.path(readings) for _, readings in made]
    return {
        "caption_right": _share(all(r.shows(words) for r in readings) for words, readings in made),
        "direction_right": _share(path[0] == words.direction for path, (words, _) in zip(paths, made, strict=True)),
        "path_r2": float(median(path[1] for path in paths)),
    }


def overlay(made: Made) -> float:
    """Share of frames that show the mark of the training clips."""
    return _share(reading.mark for _, readings in made for reading in readings)


def measure_image(bench: Bench, count: int) -> dict[str, float]:
    return _under("toy", images(bench, "test", count))


def measure_t2v(bench: Bench, count: int) -> dict[str, float]:
    made = clips(bench, bench.video(), "test", count)
    return _under("toy.t2v", judge(made)) | {"toy.adapter.overlay_without": overlay(made)}


def measure_without_motion(bench: Bench, count: int) -> dict[str, float]:
    return _under("toy.t2v.without_motion", judge(clips(bench, bench.unet, "test", max(1, count // 4))))


def measure_adapter(bench: Bench, count: int) -> dict[str, float]:
    return {"toy.adapter.overlay_with": overlay(clips(bench, bench.video(bench.adapted()), "test", max(1, count // 4)))}


def measure_zoom(bench: Bench, count: int, name: str, file: str) -> dict[str, float]:
    """The camera over shapes that move, and (half as many clips) over shapes that rest."""
    model, growing = bench.video(lora=file), name == "zoom_in"
    figures = judge_zoom(clips(bench, model, "test", count), growing)
    resting = judge_zoom(clips(bench, model, "test", max(1, count // 2), moving=False), growing)
    resting.pop("direction_right")
    return _under(f"toy.lora.{name}", figures | _under("resting", resting))


def judge_zoom(made: Made, growing: bool) -> dict[str, float]:
    """monotonic: of clips, their shape only grows, or shrinks. frames_right: of frames, they show their caption."""
    judged = judge(made)
    return {
        "monotonic": _share(oracle.monotonic(readings, growing) for _, readings in made),
        "frames_right": _share(reading.shows(words) for words, readings in made for reading in readings),
        "caption_right": judged["caption_right"],
        "direction_right": judged["direction_right"],
    }


def measure_heldout(bench: Bench, count: int) -> dict[str, float]:
    figures = _under("toy.heldout", images(bench, "heldout", count))
    return figures | _under("toy.heldout.t2v", judge(clips(bench, bench.video(), "heldout", max(1, count // 2))))


SECTIONS = {
    "image": measure_image,
    "t2v": measure_t2v,
    "without_motion": measure_without_motion,
    "adapter": measure_adapter,
    "zoom_in": partial(measure_zoom, name="zoom_in", file=config.ZOOM_IN_FILE),
    "zoom_out": partial(measure_zoom, name="zoom_out", file=config.ZOOM_OUT_FILE),
    "heldout": measure_heldout,
}


def sampling_options(parser: argparse.ArgumentParser, usual: Sampling) -> None:
    parser.add_argument("--sampler", default=usual.sampler, help=f"of the host ({usual.sampler})")
    parser.add_argument("--scheduler", default=usual.scheduler, help=f"of the host ({usual.scheduler})")
    parser.add_argument("--sampling-steps", type=int, default=usual.steps, help=f"of a clip ({usual.steps})")


def chosen_sampling(arguments: argparse.Namespace) -> Sampling:
    """What `sampling_options` asked for, and say it."""
    sampling = Sampling(arguments.sampler, arguments.scheduler, arguments.sampling_steps)
    print(f"{sampling}, on {device_name()}")
    return sampling


def _share(answers: Any) -> float:
    return float(np.mean([bool(answer) for answer in answers]))


def _under(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}.{name}": value for name, value in figures.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench toy", description=__doc__)
    parser.add_argument("--clips", type=int, default=100, help="seeds and captions a figure is taken over")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="measure only these")
    parser.add_argument("--weights", type=Path, default=config.WEIGHTS, help="folder of the demo weights")
    sampling_options(parser, SAMPLING)
    parser.add_argument("--json", help="write the figures to this file, after every section")
    arguments = parser.parse_args(argv)
    print(f"{arguments.clips} unseen captions and seeds")
    figures: dict[str, float] = {}
    with torch.inference_mode():
        bench = Bench.open(arguments.weights, chosen_sampling(arguments))
        for name in arguments.only:
            start = time.monotonic()
            found = SECTIONS[name](bench, arguments.clips)
            figures |= found
            keep(figures, arguments.json)
            said = ", ".join(f"{key.split('.')[-1]} {value:.3f}" for key, value in found.items())
            print(f"  {name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    report(figures, arguments.json)
    return 0
