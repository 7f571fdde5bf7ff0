"""Nodes of the host that look into the calls of a model, beside ours that cut a run into windows, clips or frames."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, relative_error
from latentmotion.host.attention import FrameAttention, apply_frame_attention
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.reuse import apply_reuse
from latentmotion.motion_modules.errors import ClipError
from latentmotion.motion_modules.tune_a_video.attention import Reach
from latentmotion.sampling.reuse import Reuse
from latentmotion.sampling.windows import WindowPlan, WindowSchedule

pytest_plugins = ["helpers_fixtures"]


def windowed(model: ModelPatcher, schedule: WindowSchedule = WindowSchedule.STATIC, overlap: int = 2) -> ModelPatcher:
    return apply_context(model, SlidingContext(WindowPlan(schedule, 4, overlap)))


def tiled(model: ModelPatcher, run_node: Callable) -> ModelPatcher:
    """HyperTile with two tiles at latents of 16 x 8."""
    return run_node("HyperTile", model=model, tile_size=64, swap_size=1, max_depth=1, scale_depth=False)[0]


def positive_prediction(model: ModelPatcher, negative: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["cond_denoised"]) or args["denoised"])
    torch.manual_seed(0)
    start = tiny_host.latent(4, 16, 8)
    tiny_host.sample(model, start=start, steps=1, negative=tiny_host.conditioning(model, negative))
    return seen[0]


@pytest.mark.parametrize("reach", Reach)
def test_hypertile_keeps_prompts_apart(reach: Reach, pair: Pair, run_node: Callable) -> None:
    model = tiled(apply_frame_attention(pair.plain, FrameAttention(reach, joint_norm=False)), run_node)
    assert relative_error(positive_prediction(model, 2), positive_prediction(model, 3)) < 1e-5
    images = positive_prediction(tiled(pair.plain, run_node), 2)
    assert (relative_error(positive_prediction(model, 2), images) < 1e-5) == (reach is Reach.OWN)


def cached(model: ModelPatcher, run_node: Callable, threshold: float = 0.2, node: str = "EasyCache") -> ModelPatcher:
    settings = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    return run_node(node, model=model, **settings)[0]


@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.BATCHED])
def test_each_window_has_a_cache_of_its_own(schedule: WindowSchedule, pair: Pair, run_node: Callable) -> None:
    """Ten frames in windows of four: with *batched* the last window has two."""
    video = windowed(pair.video(), schedule)
    plain = tiny_host.sample(video, 10, steps=10)
    for threshold, most in ((0.2, 0.3), (1.0, 0.5)):
        off = relative_error(tiny_host.sample(cached(video, run_node, threshold), 10, steps=10), plain)
        assert 1e-3 < off < most, "it never skips, or it takes another window's"


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_each_clip_of_a_chain_has_a_cache_of_its_own(node: str, pair: Pair, run_node: Callable) -> None:
    chain = apply_reuse(pair.video(), Reuse(4, 2))
    plain = tiny_host.sample(chain, 8, steps=10)
    off = relative_error(tiny_host.sample(cached(chain, run_node, node=node), 8, steps=10), plain)
    assert 1e-3 < off < 0.3


@pytest.mark.parametrize("frames", [6, 8])
def test_guidance_that_looks_at_one_call_is_refused_in_windows(frames: int, pair: Pair, run_node: Callable) -> None:
    guided = run_node("SelfAttentionGuidance", model=pair.video(), scale=0.5, blur_sigma=2.0)[0]
    with pytest.raises(ClipError, match="Self-Attention Guidance looks at one call.*Perturbed-Attention Guidance"):
        tiny_host.sample(windowed(guided), frames, size=16)
    assert tiny_host.sample(windowed(guided), 4, size=16).isfinite().all(), "a clip of one window has no windows"
