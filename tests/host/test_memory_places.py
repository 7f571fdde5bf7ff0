"""Memory that runs out at every kind of call, in every kind of run: the same result, one warning, nothing left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import pytest
import tiny_host
import torch
from comfy.cldm.cldm import ControlNet as ControlNetwork
from comfy.controlnet import ControlNet
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, SMALL_WIDTHS, Pair, motion_module, relative_error
from latentmotion.bench.tav import tuned_file
from latentmotion.host.attention import FrameAttention, FrameBlock, apply_frame_attention
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.invert import Inversion, invert_clip
from latentmotion.host.reuse import apply_reuse
from latentmotion.host.tuned import TemporalBlock, apply_tuned
from latentmotion.motion_modules.animatediff.network import FeedForward, TemporalAttention
from latentmotion.sampling.reuse import Reuse
from latentmotion.sampling.windows import WindowPlan, WindowSchedule
from test_memory import OUT_OF_MEMORY, run_out, warnings
from torch import Tensor

FRAMES = 3
CALLS: dict[str, tuple[Any, str]] = {
    "step": (comfy.samplers, "_calc_cond_batch"),
    "ControlNet": (ControlNet, "get_control"),
    "ControlNet's network": (ControlNetwork, "forward"),
    "UNet": (UNetModel, "forward"),
    "layer": (ResBlock, "_forward"),
    "transformer": (BasicTransformerBlock, "forward"),
    "motion attention": (TemporalAttention, "forward"),
    "motion feed-forward": (FeedForward, "forward"),
    "ST-Attention": (FrameBlock, "forward"),
    "T-Attn": (TemporalBlock, "forward"),
}
OF_HOST = ["step", "ControlNet", "ControlNet's network", "UNet", "layer", "transformer"]
OF_MOTION = [*OF_HOST, "motion attention", "motion feed-forward"]


@pytest.fixture(scope="module")
def _pair() -> Pair:
    layout = {"widths": SMALL_WIDTHS, "layers": 1}
    with torch.inference_mode():
        return Pair(tiny_host.sd15(**SMALL), motion_module(**layout), motion_module(still=True, **layout))


@pytest.fixture
def pair(_pair: Pair) -> Iterator[Pair]:
    """One image model for all tests; each must leave it as it was, down to the picture it draws."""
    yield _pair
    _pair.assert_untouched()


def prompts(model: ModelPatcher, frames: int, controls: int = 1) -> dict[str, list]:
    """Two prompts with ControlNets one behind the other, a hint for every frame."""
    found = tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2)
    for seed in range(controls):
        control = tiny_host.controlnet(seed, **SMALL)
        control.strength = 0.8
        control.cond_hint_original = torch.rand(frames, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        for _, extra in (prompt for cond in found for prompt in cond):
            extra["control"] = control.set_previous_controlnet(extra.get("control"))
            extra["control_apply_to_uncond"] = False
    return dict(zip(("positive", "negative"), found, strict=True))


def sampled(model: ModelPatcher, frames: int = FRAMES, controls: int = 1, **settings: Any) -> Callable[[], Tensor]:
    words = prompts(model, frames, controls)
    return lambda: tiny_host.sample(model, frames, **words, **settings)


def of_motion(pair: Pair) -> Callable[[], Tensor]:
    return sampled(pair.video(), controls=2, sampler="euler_ancestral")


def of_attention(pair: Pair) -> Callable[[], Tensor]:
    return sampled(apply_frame_attention(pair.plain, FrameAttention()), sampler="lcm")


def of_both(pair: Pair) -> Callable[[], Tensor]:
    return sampled(apply_frame_attention(pair.video(), FrameAttention()), sampler="dpmpp_sde")


def of_tuned(pair: Pair) -> Callable[[], Tensor]:
    return sampled(apply_tuned(pair.plain, tuned_file(pair.plain)), sampler="ddpm")


def of_windows(pair: Pair) -> Callable[[], Tensor]:
    plan = WindowPlan(WindowSchedule.LOOPED, FRAMES, 1, closed_loop=True)
    return sampled(apply_context(pair.video(), SlidingContext(plan)), 5, sampler="euler_ancestral")


def of_reuse(pair: Pair) -> Callable[[], Tensor]:
    """Clip after clip, the first one led by a clip that was finished before."""
    former = {"samples": torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    model = apply_reuse(pair.video(), Reuse(FRAMES, 2, beta=1.0), former)
    return sampled(model, 2 * FRAMES, sampler="euler_ancestral")


def of_inversion(pair: Pair) -> Callable[[], Tensor]:
    """The way up: the noisy clip and every state on the way. The way back is a run like any other."""
    latent = {"samples": torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    video, words = pair.video(), prompts(pair.plain, FRAMES)

    def invert() -> Tensor:
        how = Inversion(steps=2, cfg=1.5, keep=2, check=False)
        found = invert_clip(video, words["positive"], latent, how, words["negative"])
        return torch.cat([found.latent["samples"].flatten(), found.path.states.flatten()])

    return invert


RUNS: dict[Callable, list[str]] = {
    of_motion: OF_MOTION,
    of_attention: [*OF_HOST, "ST-Attention"],
    of_both: [*OF_MOTION, "ST-Attention"],
    of_tuned: [*OF_HOST, "T-Attn"],
    of_windows: OF_MOTION,
    of_reuse: OF_MOTION,
    of_inversion: OF_MOTION,
}


@dataclass(frozen=True)
class Run:
    """A run, what it makes where memory suffices, and how often it comes by each place."""

    again: Callable[[], Tensor]
    expected: Tensor
    calls: Counter[str]


@pytest.fixture(scope="module")
def runs() -> dict[Callable, Run]:
    """Those that were measured; filled by the tests."""
    return {}


def measured(run: Callable[[], Tensor]) -> Run:
    calls: Counter[str] = Counter()

    def counting(place: str, real: Callable) -> Callable:
        return lambda *args, **kwargs: calls.update([place]) or real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for place, (owner, name) in CALLS.items():
            patch.setattr(owner, name, counting(place, getattr(owner, name)))
        return Run(run, run(), calls)


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in RUNS.items() for place in places],
                         ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_running_out_of_memory_changes_nothing(
    kind: Callable, place: str, pair: Pair, runs: dict[Callable, Run], caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle and at the last call, so that noise was drawn before, and some of the call's work is done."""
    run = runs.get(kind) or runs.setdefault(kind, measured(kind(pair)))
    calls = run.calls[place]
    assert calls > 1 and run.expected.std() > 0.01
    for after in (calls // 2, calls - 1):
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            run_out(patch, *CALLS[place], times=1, after=after)
            found = run.again()
        assert relative_error(found, run.expected) < 1e-4, f"call {after} of {calls}"
        assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("kind", [of_motion, of_reuse])
@pytest.mark.parametrize("place", ["ControlNet's network", "UNet"])
def test_memory_that_never_suffices_ends_in_the_hosts_error(kind: Callable, place: str, pair: Pair) -> None:
    """Whose node then unloads models; the host's ControlNet and network are as they were, as the fixture sees."""
    run = kind(pair)
    with pytest.MonkeyPatch.context() as patch:
        run_out(patch, *CALLS[place], times=10**9, after=1)
        with pytest.raises(OUT_OF_MEMORY):
            run()
    assert torch.isfinite(run()).all()
