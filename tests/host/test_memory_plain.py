"""MODELs without motion modules of ours run out of memory, too: under windows, clip by clip and on the way up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import tiny_host
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.model import WanModel
from helpers_motion import SMALL, relative_error
from helpers_video import sample, wan
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.invert import Inversion, invert_clip
from latentmotion.host.reuse import apply_reuse
from latentmotion.sampling.reuse import Reuse
from latentmotion.sampling.windows import WindowPlan, WindowSchedule
from test_memory import OUT_OF_MEMORY, run_out, warnings
from torch import Tensor

LOOP = SlidingContext(WindowPlan(WindowSchedule.LOOPED, 4, 1, closed_loop=True))


def of_video_model() -> Callable[[], Tensor]:
    model = apply_context(wan(), LOOP)
    return lambda: sample(model, 7, sampler="euler_ancestral")


def of_image_model() -> Callable[[], Tensor]:
    model = apply_context(tiny_host.sd15(**SMALL), LOOP)
    return lambda: tiny_host.sample(model, 7, sampler="euler_ancestral")


def of_reuse() -> Callable[[], Tensor]:
    model = apply_reuse(tiny_host.sd15(**SMALL), Reuse(3, 1))
    return lambda: tiny_host.sample(model, 6, sampler="euler_ancestral")


def of_inversion() -> Callable[[], Tensor]:
    model = tiny_host.sd15(**SMALL)
    latent = {"samples": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    words = tiny_host.conditioning(model, 1), latent, Inversion(steps=2, cfg=1.5), tiny_host.conditioning(model, 2)
    return lambda: invert_clip(model, *words).latent["samples"]


@pytest.mark.parametrize(("kind", "network"), [(of_video_model, WanModel), (of_image_model, UNetModel),
                                               (of_reuse, UNetModel), (of_inversion, UNetModel)])  # fmt: skip
@pytest.mark.parametrize("place", ["step", "network"])
def test_running_out_of_memory_changes_nothing(
    kind: Callable, network: Any, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = kind()
    expected = run()
    target = (comfy.samplers, "_calc_cond_batch") if place == "step" else (network, "forward")
    with pytest.MonkeyPatch.context() as patch:
        run_out(patch, *target, times=1, after=2)
        assert relative_error(run(), expected) < 1e-4
    assert len(warnings(caplog)) == 1
    assert expected.std() > 0.01
    with pytest.MonkeyPatch.context() as patch:
        run_out(patch, *target, times=10**9, after=2)
        with pytest.raises(OUT_OF_MEMORY):
            run()
    assert torch.equal(run(), expected)
