"""What is said when a sampling run begins, and settings that change from place to place under areas of prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import folder_paths
import helpers_motion
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import motion_module
from helpers_restored import Watch
from latentmotion.host.motion import MotionModule, load_motion_module
from latentmotion.motion_modules.animatediff.spec import V1
from latentmotion.motion_modules.errors import ClipError
from motion_runs import Run, apply, draw, error, noise
from safetensors.torch import save_file

pytest_plugins = ["helpers_fixtures"]

OWN = {"noise_schedule": "image model's own"}


def steps_before(model: ModelPatcher, frames: int, sentence: str) -> int:
    """How many steps were sampled before the run was refused with this sentence."""
    seen: list[int] = []
    with pytest.raises(ClipError, match=sentence):
        tiny_host.sample(model, frames, steps=4, callback=lambda step, *_: seen.append(step))
    return len(seen)


def test_one_frame_a_clip_is_told_of_the_setting(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    assert steps_before(apply(run_node, image, module, frames=1), 4, "frames is 1 on Apply Motion Module") == 0
    assert steps_before(apply(run_node, image, module), 1, "the latent holds one frame only") == 0


def test_modules_that_act_late_are_checked_at_once(image: ModelPatcher, run_node: Run, watched: Watch) -> None:
    first, second = watched(motion_module(variant=V1, positions=8)), watched(motion_module(variant=V1, positions=8))
    late = apply(run_node, image, first, start_percent=0.5)
    assert steps_before(late, 9, "knows 8 frame positions.*put Sliding Context on the MODEL") == 0
    both = apply(run_node, apply(run_node, image, first, frames=2), second, start_percent=0.5, frames=4)
    assert steps_before(both, 8, "set to clips of 2 and 4 frames") == 0
    off = apply(run_node, image, first, strength=0.0)
    assert torch.equal(draw(off, noise(9)), draw(apply(run_node, image, second, strength=0.0), noise(9)))


@pytest.mark.parametrize("sampling", ["eps", "v_prediction", "lcm"])
def test_a_schedule_that_was_replaced_is_told(
    sampling: str, image: ModelPatcher, module: MotionModule, run_node: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def distilled(model: ModelPatcher) -> ModelPatcher:
        return run_node("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False)[0]

    tiny_host.sample(apply(run_node, distilled(image), module))
    assert not caplog.messages, "in this order the schedule stays"
    tiny_host.sample(distilled(apply(run_node, image, module)))
    assert len(caplog.messages) == 1 and "Put that node before Apply Motion Module" in caplog.messages[0]


def test_a_module_that_never_acts_is_told(
    image: ModelPatcher, module: MotionModule, run_node: Run, caplog: pytest.LogCaptureFixture
) -> None:
    video, start = apply(run_node, image, module, end_percent=0.5, **OWN), noise(seed=3)
    assert torch.equal(tiny_host.sample(video, start=start, steps=4, denoise=0.4),
                       tiny_host.sample(image, start=start, steps=4, denoise=0.4))  # fmt: skip
    assert len(caplog.messages) == 1 and "does nothing in this run: it acts from 0 to 0.5" in caplog.messages[0]


@pytest.mark.parametrize("zeros", ["0", torch.zeros(4, 8, 8)], ids=["text", "masks"])
def test_zeros_for_every_frame_are_the_image_model(
    zeros: Any, image: ModelPatcher, run_node: Run, watched: Watch
) -> None:
    """Also for modules whose norms see the whole clip."""
    still = apply(run_node, image, watched(motion_module(variant=V1)), strength_per_frame=zeros, **OWN)
    assert torch.equal(draw(still, noise()), draw(image, noise()))


def in_area(image: ModelPatcher, seed: int, area: tuple[int, int, int, int]) -> list:
    ((tokens, more),) = tiny_host.conditioning(image, seed)
    return [[tokens, more | {"area": area, "strength": 1.0, "set_area_to_bounds": False}]]


@pytest.mark.parametrize("grid", [16, 128, 40])
def test_masks_keep_their_place_where_prompts_have_areas(
    grid: int, image: ModelPatcher, module: MotionModule, run_node: Run
) -> None:
    """Strength is 1 on the left half of the picture; prompts work on the right half, on the left, and on both."""
    mask = torch.zeros(1, grid, grid)
    mask[..., : grid // 2] = 1.0
    video = apply(run_node, image, module, strength_per_frame=mask, **OWN)
    right, everywhere = in_area(image, 1, (16, 8, 0, 8)), tiny_host.conditioning(image, 2)
    whole = {"size": 16, "steps": 1, "cfg": 1.0, "negative": everywhere}
    alone, plain = (tiny_host.sample(model, positive=right, **whole)[..., 8:] for model in (video, image))
    assert error(alone, plain) < 1e-4, "the module acts where the mask is 0"
    left = in_area(image, 1, (16, 8, 0, 0))
    full = apply(run_node, image, module, **OWN)
    found, plain, moved = (tiny_host.sample(m, positive=left, **whole)[..., :8] for m in (video, image, full))
    assert error(found, moved) < 1e-4 < 1e-2 < error(found, plain)
    together = tiny_host.sample(video, positive=right + left, **whole)
    assert error(together[..., 8:], alone) < 1e-4 and error(together[..., :8], found) < 1e-4, "areas were mixed up"


def test_a_replaced_file_is_loaded_again(
    run_graph: Callable, core_nodes: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    name, seen = "animatediff_models", []
    _, endings = folder_paths.folder_names_and_paths[name]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], endings))
    monkeypatch.delitem(folder_paths.filename_list_cache, name, raising=False)

    class Sink:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True

        @classmethod
        def INPUT_TYPES(cls) -> dict:  # noqa: N802 - the host's name
            return {"required": {"module": ("*", {}), "number": ("INT", {})}}

        @classmethod
        def VALIDATE_INPUTS(cls, input_types: dict) -> bool:  # noqa: N802 - the host's name
            return True

        def run(self, module: MotionModule, number: int) -> dict:
            seen.append(module)
            return {"ui": {"number": [number]}}

    monkeypatch.setitem(core_nodes, "Sink", Sink)
    spec = helpers_motion.motion_spec(helpers_motion.SMALL_WIDTHS, 1)
    for number, seed in enumerate((0, 1, 1)):
        if number < 2:
            save_file(helpers_motion.motion_weights(spec, seed), tmp_path / "m.safetensors")
        load = {"class_type": "LatentMotionLoadMotionModule", "inputs": {"motion_module": "m.safetensors"}}
        sink = {"class_type": "Sink", "inputs": {"module": ["1", 0], "number": number}}
        assert run_graph({"1": load, "2": sink})["success"]
    sums = [float(next(module.patcher.model.parameters()).sum()) for module in seen]
    assert sums[0] != sums[1] and seen[1] is seen[2], "an unchanged file is not read twice"


def test_what_a_file_was_taken_for_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    name = "animatediff_models"
    _, endings = folder_paths.folder_names_and_paths[name]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], endings))
    save_file(helpers_motion.motion_weights(helpers_motion.motion_spec(helpers_motion.SMALL_WIDTHS, 1)),
              tmp_path / "m.safetensors")  # fmt: skip
    with caplog.at_level(logging.INFO):
        module = load_motion_module("m.safetensors")
    (line,) = [line for line in caplog.messages if line.startswith("m.safetensors: ")]
    variant = module.spec.variant
    assert variant.name in line and f"{module.spec.positions} frames" in line and variant.schedule.value in line
