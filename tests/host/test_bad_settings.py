"""Impossible clips and settings: each gets its own sentence, and the next run is as if nothing had been."""

from __future__ import annotations

import re
from typing import Any

import comfy.context_windows
import comfy.model_management
import helpers_motion
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import motion_module
from latentmotion.host.motion import MotionModule
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.errors import ClipError
from motion_runs import APPLY, Run, apply


@pytest.fixture(scope="module")
def image() -> ModelPatcher:
    return tiny_host.sd15(**helpers_motion.SMALL)


@pytest.fixture(scope="module")
def module() -> MotionModule:
    return motion_module(widths=helpers_motion.SMALL_WIDTHS, layers=1, positions=8)


# --- clips -------------------------------------------------------------------------------------------------------

def windows(model: ModelPatcher, length: int) -> ModelPatcher:
    """The host's own context windows, as its Context Windows (Manual) node sets them."""
    model = model.clone()
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("flat"),
        context_length=length, context_overlap=0, context_stride=1, closed_loop=False, dim=0)
    return model


CLIPS: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "one frame": ({}, 1, 0, "the latent holds one frame only. Set batch_size of the Empty Latent Image node"),
    "too many": ({}, 9, 0, "tiny-0 knows 8 frame positions, and this clip has 9 frames. .*Sliding Context.*'stretch'"),
    "too many in a video": ({"frames": 9}, 18, 0, "8 frame positions, and this clip has 9 frames. Make it shorter, or "
                            "set positions on Apply Motion Module to 'stretch'"),
    "too many in a window": ({}, 20, 10, "8 frame positions, and this window has 10 frames"),
    "not divided": ({"frames": 4}, 6, 0, "The batch holds 6 images, which 4 frames per clip do not divide. Set frames"),
    "frames beyond the batch": ({"frames": 8}, 4, 0, "The batch holds 4 images, which 8 frames per clip do not divide"),
}


@pytest.mark.parametrize("mistake", CLIPS)
def test_impossible_clips(mistake: str, image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    """The next run on the same models, with the mistake mended, gives what it always gives."""
    settings, frames, window, sentence = CLIPS[mistake]
    before, modules = tiny_host.weights(image), tiny_host.modules_of(image)
    video = apply(run_node, image, module, **settings)
    asked = windows(video, window) if window else video
    with pytest.raises(ClipError, match=sentence):
        tiny_host.sample(asked, frames)
    assert tiny_host.modules_of(image) == modules
    good = apply(run_node, image, module)
    assert torch.equal(tiny_host.sample(good, 4), tiny_host.sample(apply(run_node, image, module, frames=4), 4))
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(image, before)


def test_modules_that_disagree_on_the_clip(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    """Their norms over whole clips could follow one of them only. Zero means the whole batch, so it may agree."""
    other = motion_module(1, widths=helpers_motion.SMALL_WIDTHS, layers=1, positions=8, variant=specs.V1)
    video = apply(run_node, apply(run_node, image, module), other, frames=4)
    assert torch.isfinite(tiny_host.sample(video, 4)).all()
    with pytest.raises(ClipError, match="set to clips of 4 and 8 frames. Set frames to the same number"):
        tiny_host.sample(video, 8)


def test_zero_frames(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    with pytest.raises(ClipError, match="The latent holds no frames. Set batch_size of the Empty Latent Image node"):
        tiny_host.sample(apply(run_node, image, module), 0)


def test_stretching_is_the_way_out(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    video = apply(run_node, image, module, positions="stretch")
    assert torch.isfinite(tiny_host.sample(video, 9)).all()
    same = apply(run_node, image, module)
    assert torch.equal(tiny_host.sample(video, 8), tiny_host.sample(same, 8)), "nothing to stretch at eight frames"


# --- widgets -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("start", "end", "sentence"), [
    (0.5, 0.5, "start_percent .0.5. is not below end_percent .0.5., so the motion module would never act"),
    (0.9, 0.1, "is not below end_percent"),
    (-0.1, 1.0, "must lie between 0 and 1"),
    (0.0, 1.5, "must lie between 0 and 1"),
    (float("nan"), 1.0, "must lie between 0 and 1"),
])
def test_an_impossible_part_of_the_run(start: float, end: float, sentence: str, pack_nodes: dict) -> None:
    assert re.search(sentence, pack_nodes[APPLY].validate_inputs(start_percent=start, end_percent=end))
    assert pack_nodes[APPLY].validate_inputs(start_percent=0.2, end_percent=0.8) is True


@pytest.mark.parametrize("setting", ["noise_schedule", "positions", "group_norm"])
def test_a_choice_that_does_not_exist(setting: str, image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    with pytest.raises(ValueError, match=f"{setting} is 'as if', which is not one of its choices: as trained, "):
        apply(run_node, image, module, **{setting: "as if"})


@pytest.mark.parametrize(("value", "sentence"), [
    ("fast, slow", '"fast" in "fast, slow" cannot be read'),
    ("0: 1, 0: 2", "Frame 0 has two values"),
    ("", "The list is empty"),
    ([], "The list is empty"),
    ([1.0, float("nan")], "NaN or infinite"),
    (torch.zeros(2, 2, 2, 2), "Masks of shape"),
    (torch.zeros(0, 8, 8), "Masks of shape"),
])
@pytest.mark.parametrize("setting", ["strength_per_frame", "motion_scale_per_frame"])
def test_per_frame_values_that_cannot_be_read(setting: str, value: object, sentence: str, image: ModelPatcher,
                                              module: MotionModule, run_node: Run) -> None:
    with pytest.raises(ValueError, match=f"{setting}: .*{sentence}"):
        apply(run_node, image, module, **{setting: value})
