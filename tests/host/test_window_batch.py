"""Several windows of a long clip in one call of the UNet: the same clip, in fewer calls, and fewer windows where memory
runs out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import comfy.model_management
import pytest
import tiny_host
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, SMALL_WIDTHS, inflate, motion_module, relative_error
from latentmotion.host import memory
from latentmotion.host.attention import FrameAttention, apply_frame_attention
from latentmotion.host.conditioning import has_foreign_control
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.memory import MemoryRun
from latentmotion.motion_modules.animatediff.spec import V1
from latentmotion.sampling.frame_values import frame_values
from latentmotion.sampling.windows import WindowPlan, WindowSchedule

FRAMES, LENGTH, OVERLAP = 11, 4, 1  # windows from 0, 3, 6 and 7
OUT_OF_MEMORY = comfy.model_management.OOM_EXCEPTION


@pytest.fixture
def image() -> ModelPatcher:
    return tiny_host.sd15(**SMALL)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`at_once(n)`: plan for n windows in one call, whatever the device."""

    def choose(windows: int) -> None:
        def plan(run: MemoryRun, *args: object) -> str:
            run.windows = windows
            return "planned"

        monkeypatch.setattr(memory, "plan", plan)

    return choose


def long_clip(model: ModelPatcher, schedule: WindowSchedule = WindowSchedule.STATIC, overlap: int = OVERLAP) -> object:
    return apply_context(model, SlidingContext(WindowPlan(schedule, LENGTH, overlap)))


def images_per_call(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen, real = [], UNetModel.forward

    def watched(self: UNetModel, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(len(x))
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", watched)
    return seen


@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.UNIFORM, WindowSchedule.LOOPED])
@pytest.mark.parametrize("attention", [False, True], ids=["motion", "motion and ST-Attention"])
def test_windows_together_make_the_same_clip(
    schedule: WindowSchedule, attention: bool, image: ModelPatcher, at_once: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With norms over all frames of a window, a strength and a prompt per frame."""
    module = motion_module(widths=SMALL_WIDTHS, layers=1, variant=V1)
    video = inflate(image, module, strength=frame_values(1.0, [i / FRAMES for i in range(FRAMES)]))
    if attention:
        video = apply_frame_attention(video, FrameAttention())
    positive = tiny_host.conditioning(image, 1, batch=FRAMES)
    clips, seen = [], images_per_call(monkeypatch)
    for windows in (1, 3):
        at_once(windows)
        clips.append(tiny_host.sample(long_clip(video, schedule), FRAMES, positive=positive, steps=2))
    assert max(seen) == 2 * 3 * LENGTH, "two prompts of three windows"
    assert relative_error(clips[1], clips[0]) < 1e-4


def test_a_shorter_last_window_has_a_call_of_its_own(
    image: ModelPatcher, at_once: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = inflate(image, motion_module(widths=SMALL_WIDTHS, layers=1))
    model = long_clip(video, WindowSchedule.BATCHED, overlap=0)
    expected = tiny_host.sample(model, FRAMES, steps=1, cfg=1.0)
    at_once(8)
    seen = images_per_call(monkeypatch)
    assert relative_error(tiny_host.sample(model, FRAMES, steps=1, cfg=1.0), expected) < 1e-4
    assert seen == [2 * LENGTH, FRAMES - 2 * LENGTH]


@pytest.mark.parametrize("prompts", [1, 2])
def test_running_out_of_memory_takes_fewer_windows_first(
    prompts: int, image: ModelPatcher, at_once: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four windows, then two, then one fit; before windows are alone, neither prompts nor modules are cut."""
    model = long_clip(inflate(image, motion_module(widths=SMALL_WIDTHS, layers=1)))
    expected = tiny_host.sample(model, FRAMES, steps=1, cfg=float(prompts))
    at_once(4)
    calls, real, seen = itertools.count(), UNetModel.forward, []

    def failing(self: UNetModel, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        options = kwargs["transformer_options"]
        slabs = {call.slab_bytes for call in options["latentmotion_calls"].values()}
        seen.append((options["context_window"].windows, len(options["cond_or_uncond"]), *slabs))
        if next(calls) < 2:
            raise OUT_OF_MEMORY("injected")
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", failing)
    assert relative_error(tiny_host.sample(model, FRAMES, steps=1, cfg=float(prompts)), expected) < 1e-4
    slab = memory.slab_bytes(torch.device("cpu"))
    assert seen == [(windows, prompts, slab) for windows in (4, 2, 1, 1, 1, 1)]


def test_free_memory_and_size_choose_how_many() -> None:
    """On a GPU as many as fit, one where a window keeps it busy; on a CPU always one."""

    def windows(device: str, free: float, side: int) -> int:
        run = MemoryRun(shape=[16, 4, side, side])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "_free", lambda device: (free, 0))
            memory.plan(run, lambda shape, slab: shape[0] * 1000, torch.device(device))
        return run.windows

    assert windows("cpu", 2**40, 16) == 1
    assert windows("cuda", 2**40, 16) == 8
    assert windows("cuda", 2**40, 32) == 4
    assert windows("cuda", 2**40, 64) == 1
    assert windows("cuda", 2 * 16 * 2 * 1000, 16) == 2
    assert windows("cuda", 0, 16) == 1


def test_neighbours_controlnets_get_windows_one_by_one() -> None:
    """They take the frames of a call for one clip, also behind one of the host's."""
    foreign = SimpleNamespace(previous_controlnet=None)
    own = tiny_host.controlnet(**SMALL)
    assert not has_foreign_control([{"control": own}]) and not has_foreign_control(None)
    own.previous_controlnet = foreign
    assert has_foreign_control([{}, {"control": own}])
