"""What the host is told to reserve, and that running out of memory anywhere in a step changes nothing but the time."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import tiny_host
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, SMALL_WIDTHS, Pair, motion_module, relative_error
from latentmotion.bench.memory import bounds_of, decode_errors, estimate_errors
from latentmotion.bench.vaes import THIN
from latentmotion.host import memory
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.memory import LEAST_SLAB, MemoryRun, slab_bytes, with_less
from latentmotion.host.vae import EXACT, STREAMING
from latentmotion.motion_modules.animatediff.network import FeedForward, TemporalAttention
from latentmotion.sampling.windows import WindowPlan

FRAMES = 3
OUT_OF_MEMORY = comfy.model_management.OOM_EXCEPTION
PLACES = [(TemporalAttention, "forward"), (FeedForward, "forward"), (ResBlock, "_forward"), (UNetModel, "forward"),
          (comfy.samplers, "_calc_cond_batch")]  # fmt: skip


@pytest.fixture
def small() -> Pair:
    layout = {"widths": SMALL_WIDTHS, "layers": 1}
    pair = Pair(tiny_host.sd15(**SMALL), motion_module(**layout), motion_module(still=True, **layout))
    yield pair
    pair.assert_untouched()


def run_out(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int, after: int = 2) -> None:
    """Let a function run out of memory `times` times, the first time at its call number `after`."""
    real, calls = getattr(owner, name), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if after <= next(calls) < after + times:
            raise OUT_OF_MEMORY("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "Out of memory while sampling" in record.message]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=["attention", "feed-forward", "layer", "UNet", "step"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_clip_that_ran_out_of_memory_is_the_same_clip(
    owner: Any, name: str, cfg: float, small: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tiny_host.sample(small.video(), FRAMES, cfg=cfg)
    with monkeypatch.context() as patch:
        run_out(patch, owner, name, times=1, after=1)
        assert relative_error(tiny_host.sample(small.video(), FRAMES, cfg=cfg), expected) < 1e-4
    assert len(warnings(caplog)) == 1


def test_a_window_that_ran_out_of_memory_is_the_same_window(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    video = apply_context(small.video(), SlidingContext(WindowPlan(length=4, overlap=2)))
    expected = tiny_host.sample(video, 7, steps=1)
    with monkeypatch.context() as patch:
        run_out(patch, TemporalAttention, "forward", times=3, after=20)
        assert relative_error(tiny_host.sample(video, 7, steps=1), expected) < 1e-4


def test_a_repeated_call_has_its_controlnet(small: Pair, run_node: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    positive, _ = run_node(
        "ControlNetApplyAdvanced",
        positive=tiny_host.conditioning(small.plain, 1),
        negative=tiny_host.conditioning(small.plain, 2),
        control_net=tiny_host.controlnet(**SMALL),
        image=torch.rand(FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(1)),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    expected = tiny_host.sample(small.video(), FRAMES, steps=1, cfg=1.0, positive=positive)
    with monkeypatch.context() as patch:
        run_out(patch, TemporalAttention, "forward", times=1, after=8)  # some of the hints are taken by then
        again = tiny_host.sample(small.video(), FRAMES, steps=1, cfg=1.0, positive=positive)
    assert relative_error(again, expected) < 1e-4


def test_pieces_stay_small_and_the_user_is_told_once(
    small: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, seen, real = torch.device("cpu"), [], UNetModel.forward

    def watched(self: Any, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
        seen.extend({call.slab_bytes for call in transformer_options["latentmotion_calls"].values()})
        return real(self, *args, transformer_options=transformer_options, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UNetModel, "forward", watched)
        run_out(patch, FeedForward, "forward", times=2)
        tiny_host.sample(small.video(), FRAMES, cfg=1.0)
    full = slab_bytes(device)
    assert seen == [full, full // 2, full // 4, full // 4]
    assert len(warnings(caplog)) == 1


def test_memory_that_never_suffices_ends_in_the_hosts_error(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        run_out(patch, TemporalAttention, "forward", times=10**9)
        with pytest.raises(OUT_OF_MEMORY):
            tiny_host.sample(small.video(), FRAMES)


def test_other_errors_are_not_repeated(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(FeedForward, "forward", broken)
        with pytest.raises(ValueError, match="broken"):
            tiny_host.sample(small.video(), FRAMES)
    assert len(calls) == 1


def test_random_numbers_of_the_failed_call_are_drawn_again() -> None:
    drawn = []

    def call() -> torch.Tensor:
        drawn.append(torch.rand(4))
        if len(drawn) == 1:
            raise OUT_OF_MEMORY("injected")
        return drawn[-1]

    run = MemoryRun()
    assert torch.equal(with_less(call, run.split_conditionings, run, torch.device("cpu")), drawn[0])


def test_pieces_end_at_the_least() -> None:
    run, device = MemoryRun(), torch.device("cpu")
    while run.halve_slab(device):
        pass
    assert LEAST_SLAB <= run.slab < 2 * LEAST_SLAB


def reserved(model: ModelPatcher, monkeypatch: pytest.MonkeyPatch, sample: Callable) -> float:
    """Bytes the host sets aside at the start of a sampling run."""
    asked, real = [], comfy.model_management.load_models_gpu

    def load(models: Any, memory_required: float = 0, **kwargs: Any) -> None:
        asked.append(memory_required)
        return real(models, memory_required=memory_required, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", load)
        patch.setattr(model.model, "memory_usage_factor", 0.0)  # the host's own answer is nothing
        sample()
    assert "memory_required" not in vars(model.model)
    return asked[0]


def test_the_host_reserves_what_modules_need(
    small: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    video = small.video()
    with caplog.at_level(logging.INFO):
        found = reserved(video, monkeypatch, lambda: tiny_host.sample(video, FRAMES, steps=1))
    need = bounds_of(video).footprint(video.model, [2 * FRAMES, 4, 8, 8], slab_bytes(torch.device("cpu"))).peak
    assert found == need
    assert any(f"on {FRAMES} frames of 8x8 latents needs about" in record.message for record in caplog.records)


def test_free_memory_chooses_the_pieces_and_no_frame(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same seed, same clip on a machine with no room to spare."""
    video = apply_context(small.video(), SlidingContext(WindowPlan(length=4, overlap=2)))
    slabs, clips, real = [], [], memory.plan

    def plan(run: MemoryRun, *args: Any) -> str:
        line = real(run, *args)
        slabs.append(run.slab_on(torch.device("cpu")))
        return line

    monkeypatch.setattr(memory, "plan", plan)
    for free in (2**40, 0):
        monkeypatch.setattr(memory, "_free", lambda device, free=free: (free, 0))
        clips.append(tiny_host.sample(video, 7, steps=1))
    assert slabs == [slab_bytes(torch.device("cpu")), LEAST_SLAB]
    assert relative_error(clips[1], clips[0]) < 1e-4


@pytest.mark.parametrize("context_first", [False, True])
def test_a_long_clip_reserves_one_window(context_first: bool, small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SlidingContext(WindowPlan(length=4, overlap=2))
    image = apply_context(small.plain, context) if context_first else small.plain
    video = apply_context(small.video(base=image), context)
    need = bounds_of(video).footprint(video.model, [8, 4, 8, 8], slab_bytes(torch.device("cpu"))).peak
    assert reserved(video, monkeypatch, lambda: tiny_host.sample(video, 7, steps=1)) == need


def test_the_estimate_is_near_what_is_measured() -> None:
    errors = estimate_errors(((4, 16, 16), (8, 8, 8)))
    assert max(map(abs, errors.values())) < 0.25


def test_the_memory_of_decoding_is_near_what_is_measured() -> None:
    clip = (60, 4, 4)
    cases = [("svd", EXACT, 4, clip), ("svd", STREAMING, 2, clip), ("vidrd", EXACT, 1, clip),
             ("vidrd", STREAMING, 4, clip), ("image", EXACT, 8, clip)]  # fmt: skip
    assert max(map(abs, decode_errors(cases, THIN).values())) < 0.25
