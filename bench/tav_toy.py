"""Tune-A-Video on the toy world: clips on curved paths, tuned on, inverted, and sampled with other captions.

Everything goes as a graph would: Tune Video Model on the pictures, DDIM Inversion with the tuned model and an empty
prompt (for edits of the ground with `standardise` at 0.75), the host's sampler from the inverted noise, without a
ControlNet, and for edits that keep the outlines with one, too. The oracle reads the edited clips frame by frame.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.controlnet
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo import config, control, oracle, world
from ..demo.captions import Words, sentences
from ..host.attention import FrameAttention, apply_frame_attention
from ..host.invert import Inversion, invert_clip
from ..host.tune import Tuning, tune_video_model
from ..motion_modules.tune_a_video.attention import Reach
from ..training.loop import Recipe
from .toy import FIRST_SEED, Bench

RECIPE = Recipe("Tune-A-Video", steps=60, batch=1, learning_rate=3e-3, warmup=0, final_rate=1.0, average=0.0, seed=33,
                beta2=0.999)  # fmt: skip
STEPS, CFG, SAMPLER, SCHEDULER = 8, 3.0, "euler", "karras"
KINDS = ("shape", "colour", "ground")
"""What of a caption is edited, one at a time."""
STANDARDISED = {"ground": 0.75}
"""By what share the noise of an edit is standardised: what inversion finds in few steps holds on to the ground's
colour."""
KEEP_OUTLINES = ("colour", "ground")
FAINT = 0.02, 0.05  # thresholds of Canny: colours of the toy world may be equally bright
PARTS = ("without_inversion", "without_tuning", "without_st_attn")
NEAR = 0.03  # of the frame: how far the path of an edit may be from that of its source


@dataclass(frozen=True, eq=False)
class Source:
    """A clip to edit. pictures (f, h, w, 3), latents as the VAE gives them, path (f, 2) in pixels."""

    words: Words
    pictures: Tensor
    latents: Tensor
    path: np.ndarray
    edits: dict[str, Words]


@dataclass(frozen=True, eq=False)
class Edit:
    """What the oracle says of one edited clip of f frames.

    right (f,): whether the frame shows the new caption. offset (f, 2): from the source's centre to the edit's, as a
    share of the frame, NaN where no shape was found. size (f,) of the shape, pixels. colours (f, 6): ground and shape.
    reproduced: the source's motion that is in the edit's, 1 all of it, 0 none.
    """

    right: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    colours: np.ndarray
    reproduced: float


def source(bench: Bench, number: int) -> Source:
    """The clip of this number: a caption without a direction, and a curved way; and a caption for each kind of edit."""
    rng = np.random.default_rng(FIRST_SEED + number)
    known = [words for split in ("train", "test") for words in sentences(split, False)]
    words = known[rng.integers(len(known))]
    scene = world.clip(words, rng, path=world.curved(rng))
    pictures = world.draw(scene)
    edits = {}
    for kind in KINDS:
        others = [other for other in known if other != words and same_but(kind, other, words)]
        edits[kind] = others[rng.integers(len(others))]
    return Source(words, pictures, bench.vae.encode(pictures), scene.centre, edits)


def same_but(kind: str, one: Words, other: Words) -> bool:
    return replace(one, **{kind: getattr(other, kind)}) == other


def conditioning(bench: Bench, text: str) -> Any:
    return bench.clip.encode_from_tokens_scheduled(bench.clip.tokenize(text))


def held(bench: Bench, pictures: Tensor, *prompts: Any) -> list:
    """The prompts with the demo's ControlNet, which is given the edges of the pictures, as Apply ControlNet makes them.

    Shapes: pictures (f, h, w, 3).
    """
    network = comfy.controlnet.load_controlnet(str(bench.folder / config.CONTROL_FILE))
    network.set_cond_hint(control.edges(pictures, *FAINT), 1.0, (0.0, 1.0))
    more = {"control": network, "control_apply_to_uncond": False}
    return [[[text, {**told, **more}] for text, told in prompt] for prompt in prompts]


def sample(bench: Bench, model: Any, words: Words, clip: Source, noise: Tensor, sigmas: Tensor, outlines: bool
           ) -> Tensor:  # fmt: skip
    """As SamplerCustomAdvanced. outlines: held by a ControlNet. Shapes: noise (f, 4, h/8, w/8) -> (f, h, w, 3)."""
    guider = comfy.samplers.CFGGuider(model)
    prompts = conditioning(bench, words.text), conditioning(bench, "")
    guider.set_conds(*(held(bench, clip.pictures, *prompts) if outlines else prompts))
    guider.set_cfg(CFG)
    sampler = comfy.samplers.sampler_object(SAMPLER)
    latents = torch.zeros_like(clip.latents)
    return bench.vae.decode(guider.sample(noise, latents, sampler, sigmas, disable_pbar=True, seed=0))


def tuned(bench: Bench, clip: Source, reach: Reach) -> Any:
    """The image MODEL tuned on the clip."""
    with TemporaryDirectory(prefix="latentmotion-tav-") as folder:
        how = Tuning(path=Path(folder) / "clip.safetensors", recipe=RECIPE, frames=len(clip.pictures), reach=reach,
                     recompute=False, save_every=0, save_every_s=float("inf"), go_on=False)  # fmt: skip
        return tune_video_model(bench.unet, bench.clip, bench.vae, clip.pictures, clip.words.text, how)


def edited(bench: Bench, model: Any, clip: Source, captions: dict[str, Words], *, seed: int | None = None,
           outlines: bool = False) -> list[Tensor]:  # fmt: skip
    """The clip with each of the captions, by kind of edit: from its inverted noise, or from that of a seed."""
    latents = clip.latents
    if seed is None:
        shares = {kind: STANDARDISED.get(kind, 0.0) for kind in captions}
        found = {share: inverted(bench, model, latents, share) for share in set(shares.values())}
        starts = [found[share] for share in shares.values()]
    else:
        noise = comfy.sample.prepare_noise(torch.zeros_like(latents), seed)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULER, STEPS)
        starts = [(noise, sigmas)] * len(captions)
    return [sample(bench, model, words, clip, *start, outlines)
            for words, start in zip(captions.values(), starts, strict=True)]  # fmt: skip


def inverted(bench: Bench, model: Any, latents: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Noise and schedule, from DDIM Inversion with an empty prompt."""
    how = Inversion(steps=STEPS, scheduler=SCHEDULER, check=False, standardise=share)
    way = invert_clip(model, conditioning(bench, ""), {"samples": latents}, how)
    return way.noise.generate_noise({"samples": torch.zeros_like(latents)}), way.sigmas


def arms(bench: Bench, clip: Source, number: int, parts: Sequence[str]) -> Iterator[tuple[str, list[Tensor]]]:
    """Edited clips with everything, and with one part left out each. The first is the source's own caption, sampled
    with everything; the third has a ControlNet where the edit keeps the outlines, and else is the second."""
    captions, model = clip.edits, tuned(bench, clip, Reach.SPARSE)
    back, *made = edited(bench, model, clip, {"source": clip.words, **captions})
    yield "source", [back]
    yield "full", made
    same = {kind: captions[kind] for kind in KEEP_OUTLINES}
    kept = dict(zip(same, edited(bench, model, clip, same, outlines=True), strict=True))
    yield "controlnet", [kept.get(kind, plain) for kind, plain in zip(captions, made, strict=True)]
    if "without_inversion" in parts:
        yield "without_inversion", edited(bench, model, clip, captions, seed=FIRST_SEED + number)
    if "without_tuning" in parts:
        yield "without_tuning", edited(bench, apply_frame_attention(bench.unet, FrameAttention()), clip, captions)
    if "without_st_attn" in parts:
        yield "without_st_attn", edited(bench, tuned(bench, clip, Reach.OWN), clip, captions)


def judge(pictures: Tensor, words: Words, clip: Source) -> Edit:
    readings = oracle.read(pictures)
    centres = np.array([reading.centre for reading in readings])
    sizes = np.array([reading.size for reading in readings])
    found = ~np.isnan(centres).any(1)
    a, b = centres[found], clip.path[found]
    a, b = a - a.mean(0) if len(a) else a, b - b.mean(0) if len(b) else b
    total = float((b * b).sum())
    colours = np.array([seen(frame, *reading.centre, reading.size) for frame, reading in
                        zip(pictures.float().cpu().numpy(), readings, strict=True)])  # fmt: skip
    right = np.array([reading.shows(words) for reading in readings])
    return Edit(right, (centres - clip.path) / world.SIZE, sizes, colours, float((a * b).sum()) / total if total else 0)


def seen(frame: np.ndarray, x: float, y: float, size: float) -> np.ndarray:
    """Colour of the ground and in the middle of the shape, NaN for that where there is none. Shapes: -> (6,)."""
    ground, shape = np.median(frame.reshape(-1, 3), axis=0), np.full(3, np.nan)
    if not np.isnan(x):
        rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5
        inside = np.hypot(columns - x, rows - y) < max(size / 4, 2.0)
        shape = frame[inside].mean(0) if inside.any() else shape
    return np.concatenate([ground, shape])


def path_rmse(edit: Edit) -> float:
    """Over the frames with a shape; NaN where there is none."""
    squares = (edit.offset**2).sum(1)
    return float(np.sqrt(np.nanmean(squares))) if not np.isnan(squares).all() else float("nan")


def jerk(edit: Edit) -> float:
    """Root mean square of the second difference of the offset from the source, over time: 0 where the shape moves as
    evenly as there. Share of the frame."""
    squares = (np.diff(edit.offset, n=2, axis=0) ** 2).sum(1)
    return float(np.sqrt(np.nanmean(squares))) if not np.isnan(squares).all() else float("nan")


def spread(values: np.ndarray) -> float:
    """Root mean square distance of frames from their mean. Shapes: values (f, n)."""
    values = values[~np.isnan(values).any(1)]
    return float(np.sqrt(((values - values.mean(0)) ** 2).sum(1).mean())) if len(values) else float("nan")


def figures_of(edits: list[Edit]) -> dict[str, float]:
    """edit_right: every frame shows the new caption. frames_right: share of frames. path_near: found in every frame,
    and within 3 % of the frame. The others: means over the clips in which they can be read."""
    paths = np.array([path_rmse(edit) for edit in edits])
    whole = np.array([not np.isnan(edit.offset).any() for edit in edits])
    return {
        "edit_right": float(np.mean([edit.right.all() for edit in edits])),
        "frames_right": float(np.mean([edit.right.mean() for edit in edits])),
        "path_rmse": float(np.nanmean(paths)),
        "path_rmse_median": float(np.nanmedian(paths)),
        "path_near": float(np.mean(whole & (paths <= NEAR))),
        "motion_kept": float(np.mean([edit.reproduced for edit in edits])),
        "jerk": float(np.nanmean([jerk(edit) for edit in edits])),
        "size_drift": float(np.nanmean([spread(edit.size[:, None]) / np.nanmean(edit.size) for edit in edits])),
        "colour_drift": float(np.nanmean([spread(edit.colours) for edit in edits])),
    }


def measure(bench: Bench, count: int, ablated: int, minutes: float, sheets: Path | None) -> dict[str, float]:
    """Edits of `count` clips, the first `ablated` of them without each part too; of as many as are begun in time."""
    made: dict[str, list[tuple[str, Edit]]] = {}
    begun, done = time.monotonic(), 0
    for number in range(count):
        if time.monotonic() - begun > minutes * 60:
            break
        clip, rows = source(bench, number), []
        for arm, clips in arms(bench, clip, number, PARTS if number < ablated else ()):
            captions = {"source": clip.words} if arm == "source" else clip.edits
            judged = [(kind, judge(pictures, words, clip))
                      for (kind, words), pictures in zip(captions.items(), clips, strict=True)]  # fmt: skip
            made.setdefault(arm, []).extend(judged)
            rows += clips
            said = "  ".join(f"{kind} {edit.right.sum()}/{len(edit.right)} {world.SIZE * path_rmse(edit):.1f} px"
                             for kind, edit in judged)  # fmt: skip
            print(f"  {number + 1} {clip.words.text}, {arm}: {said} ({time.monotonic() - begun:.0f} s)", flush=True)
        done += 1
        so_far = figures_of([edit for _, edit in made["full"]])
        print(f"  so far: edit_right {so_far['edit_right']:.3f}, path_rmse {so_far['path_rmse']:.4f}", flush=True)
        if sheets is not None:
            write_sheet([clip.pictures, *rows], sheets / f"clip_{number:02}.png")
    return {"tav.clips": float(done), "tav.ablated_clips": float(min(done, ablated))} | named(made)


def named(made: dict[str, list[tuple[str, Edit]]]) -> dict[str, float]:
    """Figures by name: of the whole method for all clips and each kind of edit, and, as `with_all`, for the clips that
    were edited without each part as well."""
    full = made["full"]
    every = {"tav": full} | {f"tav.{kind}": [pair for pair in full if pair[0] == kind] for kind in KINDS}
    every |= {f"tav.{arm}": judged for arm, judged in made.items() if arm != "full"}
    parts = [len(judged) for arm, judged in made.items() if arm.startswith("without")]
    if parts:
        every["tav.with_all"] = full[: parts[0]]
    return {f"{prefix}.{name}": value for prefix, judged in every.items()
            for name, value in figures_of([edit for _, edit in judged]).items()}  # fmt: skip


def write_sheet(clips: list[Tensor], path: Path) -> None:
    """Every second frame of each clip, clip under clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [torch.cat([*clip.cpu()[::2]], 1) for clip in clips]
    Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()).save(path)
