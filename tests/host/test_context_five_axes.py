"""Sliding Context on a real video model of the host, whose latents have a time axis: small Wan 2.1 networks through the
host's sampler. A model made to look at one frame at a time must draw the same with and without windows; that proves the
cutting of everything per frame. The others show the windows themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.conds
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import relative_error
from helpers_video import CHANNELS, SIDE, random, sample, text, wan
from latentmotion.host.conditioning import ControlSlices, cut_conds
from latentmotion.host.context import ContextWindow, SlidingContext, apply_context
from latentmotion.sampling.fuse import FuseMethod
from latentmotion.sampling.noise import NoiseKind
from latentmotion.sampling.windows import WindowPlan, WindowSchedule
from torch import Tensor

FRAMES, LENGTH, OVERLAP = 12, 6, 2
TIME = {"c_concat": 2, "denoise_mask": 2, "vace_context": 3, "audio_embed": 1}  # axes
PLANS = {
    "static": WindowPlan(WindowSchedule.STATIC, LENGTH, OVERLAP),
    "uniform": WindowPlan(WindowSchedule.UNIFORM, LENGTH, OVERLAP, stride=2),
    "closed loop": WindowPlan(WindowSchedule.LOOPED, LENGTH, OVERLAP, closed_loop=True),
    "batched": WindowPlan(WindowSchedule.BATCHED, LENGTH, 0),
    "shorter last window": WindowPlan(WindowSchedule.BATCHED, 5, 0),
}


@pytest.fixture(scope="module")
def video() -> ModelPatcher:
    return wan()


@pytest.fixture(scope="module")
def video_with_image() -> ModelPatcher:
    """It takes twenty more channels: a mask and the latents of an image for every frame."""
    return wan(in_dim=CHANNELS + 20)


def windowed(model: ModelPatcher, plan: str = "static", **more: Any) -> ModelPatcher:
    return apply_context(model, SlidingContext(PLANS[plan], **more))


def apart(model: ModelPatcher) -> ModelPatcher:
    """The same network, shown one frame at a time."""
    model = model.clone()

    def frame_by_frame(apply_model: Callable, call: dict) -> Tensor:
        x, made = call["input"], []
        for i in range(x.shape[2]):
            extra = {key: value.narrow(TIME[key], i, 1) if key in TIME else value for key, value in call["c"].items()}
            made.append(apply_model(x[:, :, i : i + 1], call["timestep"], **extra))
        return torch.cat(made, 2)

    model.set_model_unet_function_wrapper(frame_by_frame)
    return model


@pytest.fixture
def seen(video: ModelPatcher) -> Iterator[list[int]]:
    """Latent frames of every call of the network."""
    frames: list[int] = []
    hook = video.model.diffusion_model.register_forward_pre_hook(lambda _, args: frames.append(args[0].shape[2]))
    yield frames
    hook.remove()


@pytest.mark.parametrize("plan", PLANS)
def test_the_network_sees_windows(plan: str, video: ModelPatcher, seen: list[int]) -> None:
    model, expected = windowed(video, plan), []
    for step in range(2):
        expected += [len(window) for window in PLANS[plan].windows(FRAMES, step)]
    clip = sample(model, FRAMES, cfg=1.0)
    assert seen == expected
    assert clip.shape == (1, CHANNELS, FRAMES, SIDE, SIDE) and torch.isfinite(clip).all()
    assert torch.equal(clip, sample(model, FRAMES, cfg=1.0))
    whole = sample(video, FRAMES, cfg=1.0)
    assert seen[-1] == FRAMES and relative_error(clip, whole) > 1e-3


@pytest.mark.parametrize("frames", [1, LENGTH])
def test_a_clip_no_longer_than_a_window_is_left_alone(frames: int, video: ModelPatcher) -> None:
    assert torch.equal(sample(windowed(video), frames), sample(video, frames))


def test_the_nodes_of_both(video: ModelPatcher, run_node: Callable) -> None:
    """The node of the pack and the host's KSampler."""
    (model,) = run_node("LatentMotionSlidingContext", model=video, context_length=LENGTH, context_overlap=OVERLAP,
                        schedule="standard static", context_stride=1, closed_loop=False, fuse="pyramid",
                        noise="independent")  # fmt: skip
    latent = {"samples": torch.zeros(1, CHANNELS, FRAMES, SIDE, SIDE)}
    (made,) = run_node("KSampler", model=model, seed=0, steps=2, cfg=2.0, sampler_name="euler", scheduler="normal",
                       positive=text(1), negative=text(2), latent_image=latent, denoise=1.0)  # fmt: skip
    assert torch.equal(made["samples"], sample(windowed(video), FRAMES))


@pytest.mark.parametrize("plan", ["closed loop", "shorter last window"])
@pytest.mark.parametrize("fuse", FuseMethod)
def test_frames_kept_apart_are_drawn_as_without_windows(plan: str, fuse: FuseMethod, video: ModelPatcher) -> None:
    model = apart(video)
    assert relative_error(sample(windowed(model, plan, fuse=fuse), FRAMES), sample(model, FRAMES)) < 1e-4


def test_noise_is_arranged_along_time(video: ModelPatcher) -> None:
    """A model that keeps frames apart turns repeated noise into repeated frames."""
    clip = sample(windowed(apart(video), "batched", noise=NoiseKind.REPEATED), FRAMES)
    assert relative_error(clip[:, :, LENGTH:], clip[:, :, :LENGTH]) < 1e-5
    assert relative_error(clip[:, :, 1], clip[:, :, 0]) > 1e-2


# --- what goes with each frame --------------------------------------------------------------------------------------


def frames_of(seed: int, channels: int = CHANNELS) -> Tensor:
    return random(1, channels, FRAMES, SIDE, SIDE, seed=seed)


PER_FRAME: dict[str, dict[str, Callable[[], Any]]] = {
    "image of each frame": {"positive": lambda: text(1, concat_latent_image=frames_of(3))},
    "image and mask of each frame": {
        "positive": lambda: text(1, concat_latent_image=frames_of(3), concat_mask=frames_of(4, 1).round())
    },
    "noise mask": {"noise_mask": lambda: random(1, 1, FRAMES, SIDE, SIDE, seed=5).round(),
                   "start": lambda: frames_of(6)},
    "mask of a prompt": {"positive": lambda: [*text(1, mask=random(1, FRAMES, 8, 8, seed=7), mask_strength=0.7),
                                              *text(3)]},
}  # fmt: skip


@pytest.mark.parametrize("plan", ["static", "closed loop", "shorter last window"])
@pytest.mark.parametrize("what", PER_FRAME)
def test_what_belongs_to_a_frame_follows_it(plan: str, what: str, video_with_image: ModelPatcher) -> None:
    model = apart(video_with_image)
    settings = {name: make() for name, make in PER_FRAME[what].items()}
    whole = sample(model, FRAMES, **settings)
    assert relative_error(sample(windowed(model, plan), FRAMES, **settings), whole) < 1e-4
    assert relative_error(sample(model, FRAMES), whole) > 1e-3, "it counts"


def test_control_latents_of_vace_follow_the_frame() -> None:
    """Sets of them stand before the channels, so that time is one axis later. One mask is for all of its set."""
    video = wan(model_type="vace", vace_layers=1, vace_in_dim=2 * CHANNELS + 64)
    control = {"vace_frames": [frames_of(1, 2 * CHANNELS), frames_of(2, 2 * CHANNELS)], "vace_strength": [1.0, 0.5],
               "vace_mask": [frames_of(3, 64), frames_of(4, 64)]}  # fmt: skip
    model, settings = apart(video), {"positive": text(1, **control), "steps": 1}
    whole = sample(model, FRAMES, **settings)
    assert relative_error(sample(windowed(model, "closed loop"), FRAMES, **settings), whole) < 1e-4
    assert relative_error(sample(model, FRAMES, steps=1), whole) > 1e-3, "they count"


def test_the_sound_of_humo_follows_the_frame() -> None:
    video = wan(model_type="humo")
    sound = random(1, FRAMES, 8, 5, 1280, seed=5)
    model, settings = apart(video), {"positive": text(1, audio_embed=sound), "steps": 1, "cfg": 1.0}
    whole = sample(model, FRAMES, **settings)
    assert relative_error(sample(windowed(model, "closed loop"), FRAMES, **settings), whole) < 1e-4
    backwards = text(1, audio_embed=sound.flip(1))
    assert relative_error(sample(model, FRAMES, **settings | {"positive": backwards}), whole) > 1e-3, "it counts"


@pytest.mark.parametrize(
    ("key", "axis", "count", "window", "entries"),
    [
        ("audio_embed", 3, 48, [0, 2, 5], [0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 23]),  # S2V
        ("pose_latents", 2, 11, [0, 1, 2, 3], [0, 1, 2]),
        ("pose_latents", 2, 11, [6, 7, 8], [6, 7]),
        ("pose_latents", 2, 11, [10, 11, 0, 1], [10, 0, 0]),
        ("face_pixel_values", 2, 41, [9, 10, 11], [36, 37, 38, 39, 40]),
        ("face_pixel_values", 2, 41, [0, 1, 2], list(range(8))),
    ],
)
def test_conditions_of_other_lengths_are_cut_to_the_frames(
    key: str, axis: int, count: int, window: list[int], entries: list[int]
) -> None:
    """The whole clip has 12 frames; the networks of Wan Animate give the first frame of what they see no pose."""
    whole = torch.arange(count).view(*[1] * axis, count, *[1] * (4 - axis))
    x = torch.zeros(1, CHANNELS, FRAMES, SIDE, SIDE)
    conds = [{"model_conds": {key: comfy.conds.CONDRegular(whole)}}]
    (cut,) = cut_conds(conds, x, ContextWindow(window, 2, FRAMES), ControlSlices(), None)
    assert cut["model_conds"][key].cond.flatten().tolist() == entries


def test_a_noise_mask_is_a_noise_level_for_each_frame_of_wan_2_2() -> None:
    """Its 5B model is told of clean frames by their timesteps, which come from the mask among the conditioning."""
    channels, video = 48, wan(in_dim=48, out_dim=48)
    mask = torch.ones(1, 1, FRAMES, SIDE, SIDE)
    mask[:, :, [0, 7]] = 0.0
    model, settings = apart(video), {"start": frames_of(6, channels), "noise_mask": mask, "steps": 1}
    whole = sample(model, FRAMES, **settings)
    assert relative_error(sample(windowed(model, "closed loop"), FRAMES, **settings), whole) < 1e-4
    assert torch.isfinite(sample(windowed(video), FRAMES, **settings)).all()


def test_frames_beside_the_clip_are_for_every_window(video: ModelPatcher, seen: list[int]) -> None:
    """Also where they are as many as the clip has."""
    beside, shapes = frames_of(1), []
    hook = video.model.diffusion_model.patch_embedding.register_forward_pre_hook(
        lambda _, args: shapes.append(args[0].shape[2])
    )
    try:
        sample(windowed(video), FRAMES, steps=1, cfg=1.0, positive=text(1, time_dim_concat=beside))
    finally:
        hook.remove()
    assert seen == [LENGTH] * 3 and shapes == [LENGTH + FRAMES] * 3


def test_videos_of_a_batch_do_not_leak(video: ModelPatcher) -> None:
    start = torch.cat([frames_of(1), frames_of(2)])
    other = torch.cat([frames_of(1), frames_of(3)])
    both, changed = (sample(windowed(video), FRAMES, start=x, denoise=0.6) for x in (start, other))
    assert torch.equal(both[0], changed[0]) and relative_error(both[1], changed[1]) > 1e-3


def test_closed_loop_ties_the_last_frame_to_the_first(video_with_image: ModelPatcher) -> None:
    """A change of the first frame's image reaches the last frame only through a window across the seam."""
    reached = {}
    for plan in ("static", "closed loop"):
        images = frames_of(3)
        first = sample(windowed(video_with_image, plan), FRAMES, steps=1, positive=text(1, concat_latent_image=images))
        images = images.clone()
        images[:, :, 0] += 1.0
        other = sample(windowed(video_with_image, plan), FRAMES, steps=1, positive=text(1, concat_latent_image=images))
        assert not torch.equal(first[:, :, 0], other[:, :, 0])
        reached[plan] = not torch.equal(first[:, :, -1], other[:, :, -1])
    assert reached == {"static": False, "closed loop": True}


# --- areas of some frames -------------------------------------------------------------------------------------------


AREAS = {
    "first half": {"temporal": 0.5},
    "a third in the middle": {"temporal": 0.34, "z": 0.33},
    "two frames": {"temporal": 0.17, "z": 0.17},
    "all but the ends": {"temporal": 0.84, "z": 0.08},
    "a corner of the end": {"temporal": 0.5, "z": 0.5, "width": 0.5, "height": 0.5, "x": 0.5, "y": 0.5},
    "a corner of all frames": {"width": 0.5, "height": 0.5},
}


@pytest.mark.parametrize("plan", ["uniform", "closed loop", "shorter last window"])
@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("masked", [False, True], ids=["area", "area and mask"])
def test_areas_of_some_frames_follow_them(
    plan: str, area: str, masked: bool, video: ModelPatcher, run_node: Callable
) -> None:
    """With the fading towards the sides of an area that the host gives the whole clip."""
    widgets = {"width": 1.0, "height": 1.0, "temporal": 1.0, "x": 0.0, "y": 0.0, "z": 0.0, "strength": 1.5}
    prompt = text(3, **({"mask": random(1, FRAMES, SIDE, SIDE, seed=7)} if masked else {}))
    (part,) = run_node("ConditioningSetAreaPercentageVideo", conditioning=prompt, **widgets | AREAS[area])
    settings = {"positive": text(1) + part, "steps": 1}
    model = apart(video)
    whole = sample(model, FRAMES, **settings)
    assert relative_error(sample(windowed(model, plan), FRAMES, **settings), whole) < 1e-4
    assert relative_error(sample(model, FRAMES, steps=1), whole) > 1e-3, "it counts"


def test_an_area_is_shown_to_the_network_in_parts(video: ModelPatcher, seen: list[int], run_node: Callable) -> None:
    """Frames 2 to 10 in windows over a seam: one that begins at 8 has frames 8 to 10 and 0 and 1, then 2 and 3."""
    (part,) = run_node("ConditioningSetAreaPercentageVideo", conditioning=text(1), width=1.0, height=1.0,
                       temporal=0.75, x=0.0, y=0.0, z=0.17, strength=1.0)  # fmt: skip
    clip = sample(windowed(video, "closed loop"), FRAMES, steps=1, cfg=1.0, positive=part)
    windows = PLANS["closed loop"].windows(FRAMES)
    assert windows == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [8, 9, 10, 11, 0, 1]]
    assert seen == [4, 6, 3]
    assert torch.isfinite(clip).all()
    seen.clear()
    x, window = torch.zeros(1, CHANNELS, FRAMES, SIDE, SIDE), ContextWindow([9, 10, 11, 0, 1, 2], 2, FRAMES)
    conds = [{"area": (9, SIDE, SIDE, 2, 0, 0), "uuid": 1}, {"area": (2, SIDE, SIDE, 4, 0, 0)}]
    parts = cut_conds(conds, x, window, ControlSlices(), None)
    assert [cond["area"] for cond in parts] == [(2, SIDE, SIDE, 0, 0, 0), (1, SIDE, SIDE, 5, 0, 0)]
    assert conds[0] == {"area": (9, SIDE, SIDE, 2, 0, 0), "uuid": 1}, "nothing that was passed in is changed"
