"""A MODEL with a motion module goes through every sampler node and every sampler name of the host."""

from __future__ import annotations

from collections.abc import Callable

import comfy.samplers
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, relative_error
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

FRAMES = 4


def _latent() -> dict[str, Tensor]:
    return {"samples": tiny_host.latent(FRAMES)}


def _inputs(model: ModelPatcher) -> dict:
    return {"positive": tiny_host.conditioning(model, 1), "negative": tiny_host.conditioning(model, 2)}


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_of_the_host(name: str, pair: Pair) -> None:
    frames = 2 if name == "dpm_adaptive" else FRAMES  # it takes as many steps as it likes
    try:
        clip = tiny_host.sample(pair.video(), frames, sampler=name)
    except Exception as ours:
        try:
            tiny_host.sample(pair.plain, frames, sampler=name)
        except type(ours) as error:
            pytest.skip(f"the host itself cannot run {name} for two steps: {type(error).__name__}: {error}")
        raise
    assert clip.shape == (frames, 4, 8, 8) and torch.isfinite(clip).all()
    assert not torch.equal(clip, tiny_host.sample(pair.plain, frames, sampler=name))


def test_ksampler_node_is_the_same_each_time(pair: Pair, run_node: Callable) -> None:
    model = pair.video()
    widgets = {"seed": 5, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    first, second = (
        run_node("KSampler", model=model, latent_image=_latent(), **_inputs(model), **widgets)[0]["samples"]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, tiny_host.sample(model, FRAMES, seed=5, cfg=3.0))


def _advanced(
    run_node: Callable, model: ModelPatcher, latent: dict, first: int, last: int, ends: tuple[str, str]
) -> dict:
    return run_node(
        "KSamplerAdvanced",
        model=model,
        latent_image=latent,
        **_inputs(model),
        noise_seed=5,
        steps=4,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        start_at_step=first,
        end_at_step=last,
        add_noise=ends[0],
        return_with_leftover_noise=ends[1],
    )[0]


def test_split_steps_are_the_unsplit_run(pair: Pair, run_node: Callable) -> None:
    errors = []
    for model in (pair.plain, pair.video()):
        whole = _advanced(run_node, model, _latent(), 0, 4, ("enable", "disable"))["samples"]
        half = _advanced(run_node, model, _latent(), 0, 2, ("enable", "enable"))
        both = _advanced(run_node, model, half, 2, 4, ("disable", "disable"))["samples"]
        errors.append(relative_error(both, whole))
    assert errors[1] <= max(2 * errors[0], 1e-5), f"plain {errors[0]}, with motion {errors[1]}"


def test_refining_with_the_image_model(pair: Pair, run_node: Callable) -> None:
    """First steps as video, last steps as separate images, and back: each model keeps to itself."""
    video = pair.video()
    half = _advanced(run_node, video, _latent(), 0, 2, ("enable", "enable"))
    mixed = _advanced(run_node, pair.plain, half, 2, 4, ("disable", "disable"))["samples"]
    again = _advanced(run_node, pair.plain, half, 2, 4, ("disable", "disable"))["samples"]
    whole = _advanced(run_node, video, _latent(), 0, 4, ("enable", "disable"))["samples"]
    assert torch.equal(mixed, again) and not torch.equal(mixed, whole)


def _custom(run_node: Callable, model: ModelPatcher, guider: tuple) -> Tensor:
    (noise,) = run_node("RandomNoise", noise_seed=5)
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")
    (sigmas,) = run_node("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
    parts = {"noise": noise, "guider": guider[0], "sampler": sampler, "sigmas": sigmas}
    return run_node("SamplerCustomAdvanced", latent_image=_latent(), **parts)[0]["samples"]


def test_custom_advanced_is_ksampler(pair: Pair, run_node: Callable) -> None:
    model = pair.video()
    clip = _custom(run_node, model, run_node("CFGGuider", model=model, cfg=3.0, **_inputs(model)))
    assert torch.equal(clip, tiny_host.sample(model, FRAMES, seed=5, cfg=3.0))


@pytest.mark.parametrize("guider", ["BasicGuider", "DualCFGGuider"])
def test_one_and_three_conditionings_per_call(guider: str, pair: Pair, run_node: Callable) -> None:
    """The frame count is read off the call, whether it holds one conditioning or three."""
    one, two, three = (tiny_host.conditioning(pair.plain, seed) for seed in (1, 2, 3))
    inputs = {"conditioning": one}
    if guider == "DualCFGGuider":
        inputs = {"cond1": one, "cond2": two, "negative": three, "cfg_conds": 2.0, "cfg_cond2_negative": 3.0}
        inputs["style"] = "regular"
    clips = [
        _custom(run_node, model, run_node(guider, model=model, **inputs))
        for model in (pair.plain, pair.still, pair.video())
    ]
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])


def test_guidance_in_one_call_or_two(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = pair.video(), []
    model.add_wrapper_with_key(
        "apply_model", "spy", lambda executor, x, *args, **kw: (sizes.append(x.shape[0]), executor(x, *args, **kw))[1]
    )
    together = tiny_host.sample(model, FRAMES)
    monkeypatch.setattr(pair.plain.model, "memory_required", lambda *args, **kw: 1e30, raising=False)
    apart = tiny_host.sample(model, FRAMES)
    assert sizes == [2 * FRAMES] * 2 + [FRAMES] * 4
    assert relative_error(apart, together) < 1e-5


def test_guidance_scale_one_skips_the_negative(pair: Pair) -> None:
    still, plain, video = (tiny_host.sample(model, FRAMES, cfg=1.0) for model in (pair.still, pair.plain, pair.video()))
    assert torch.equal(still, plain) and not torch.equal(video, plain)


def test_several_videos_in_one_batch(pair: Pair) -> None:
    """Two clips sampled together are the two sampled alone, given the same noise."""
    model, alone = pair.video(frames=FRAMES), pair.video()
    noise = torch.randn(2 * FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    conds = tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2)

    def run(patcher: ModelPatcher, part: Tensor) -> Tensor:
        return comfy.sample.sample(patcher, part, 2, 2.0, "euler", "normal", *conds, torch.zeros_like(part), seed=0)

    both = run(model, noise)
    parts = torch.cat([run(alone, noise[:FRAMES]), run(alone, noise[FRAMES:])])
    assert relative_error(both, parts) < 1e-5


def test_frames_see_each_other_only_with_motion(pair: Pair) -> None:
    """Change the noise of the last frame: the first frame of an image batch stays, that of a clip moves."""
    noise = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    other = noise.clone()
    other[-1] += 1.0
    conds = tiny_host.conditioning(pair.plain, 1), tiny_host.conditioning(pair.plain, 2)
    for model, coupled in ((pair.plain, False), (pair.video(), True)):
        first, second = (
            comfy.sample.sample(model, start, 2, 2.0, "euler", "normal", *conds, torch.zeros_like(start), seed=0)[0]
            for start in (noise, other)
        )
        assert torch.allclose(first, second, atol=1e-5) is not coupled
