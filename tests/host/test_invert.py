"""DDIM inversion on the host's samplers. Most tests give the host's model a formula for a network, quick and exact, in
which every frame of a clip sees the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, relative_error
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.invert import Inversion, Inverted, invert_clip
from latentmotion.host.reuse import apply_reuse
from latentmotion.host.schedule import noise_scale
from latentmotion.motion_modules.errors import ClipError, ModelMismatchError
from latentmotion.sampling.inversion import Convention, Prediction, invert, plan_ascent
from latentmotion.sampling.noise import NoiseKind, standardise
from latentmotion.sampling.reuse import Reuse
from latentmotion.sampling.windows import WindowPlan
from test_bad_settings import windows
from test_travel import MIXED, StandInClip, per_frame, travel
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

FRAMES = 4
NODE = "LatentMotionDDIMInversion"
WIDGETS = {"steps": 4, "scheduler": "ddim_uniform", "denoise": 1.0, "cfg": 1.0, "convention": "released code",
           "keep_frames": 16, "reconstruct": True}  # fmt: skip


def denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """What stands for the network: from one clip (n, c, h, w) at one noise level to its latents."""
    z = x / (1 + sigma**2).sqrt()
    return x - sigma * torch.tanh(z + 0.5 * z.roll(1, 0) - 0.3 * z.mean(0) + 0.1 * torch.log1p(sigma))


def formula(model: ModelPatcher) -> ModelPatcher:
    model = model.clone()

    def wrapper(apply_model: Callable, call: dict) -> Tensor:
        parts = call["input"].chunk(len(call["cond_or_uncond"]))
        return torch.cat([denoised(part, call["timestep"][0]) for part in parts])

    model.set_model_unet_function_wrapper(wrapper)
    return model


def clip(frames: int = FRAMES, seed: int = 0) -> dict[str, Tensor]:
    """A LATENT of a clip, of the size that the host's latents have outside of a sampler."""
    return {"samples": torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) / 0.18215}


def up(model: ModelPatcher, latent: dict | None = None, **settings: Any) -> Inverted:
    prompts = {"positive": settings.pop("positive", None) or tiny_host.conditioning(model, 1),
               "negative": settings.pop("negative", None)}  # fmt: skip
    return invert_clip(model, latent=latent or clip(), how=Inversion(**{"steps": 4} | settings), **prompts)


def down(run_node: Callable, model: ModelPatcher, found: Inverted, cfg: float = 1.0) -> Tensor:
    """The host's SamplerCustom on the outputs of the node."""
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")
    return run_node("SamplerCustom", model=model, add_noise=False, noise_seed=7, cfg=cfg, sampler=sampler,
                    positive=tiny_host.conditioning(model, 1), negative=tiny_host.conditioning(model, 2),
                    sigmas=found.sigmas, latent_image=found.latent)[0]["samples"]  # fmt: skip


# --- the way up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("kind", ["eps", "v_prediction"])
def test_the_way_up_is_that_of_the_formula(kind: str, convention: Convention, pair: Pair, run_node: Callable) -> None:
    (model,) = run_node("ModelSamplingDiscrete", model=pair.plain, sampling=kind, zsnr=False)
    sampling, latent = model.get_model_object("model_sampling"), clip()
    found = up(formula(model), latent, convention=convention, keep=2)
    prediction = Prediction.VELOCITY if kind == "v_prediction" else Prediction.NOISE
    assert torch.equal(found.sigmas, comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 4))
    ascent = plan_ascent(found.sigmas, convention, float(sampling.sigma_min), prediction)
    start = latent["samples"] * 0.18215
    states = [start, *(x for x, _ in invert(denoised, start, ascent))]
    assert relative_error(found.latent["samples"] * 0.18215, states[-1]) < 1e-5
    assert relative_error(found.path.states, torch.stack(states)[:, -2:]) < 1e-5
    assert torch.equal(found.path.levels, ascent.levels)
    comfy.model_management.unload_all_models()  # takes the patched sampling off again


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "karras", "normal"])
def test_more_steps_come_back_closer(scheduler: str, pair: Pair) -> None:
    errors = [up(formula(pair.plain), steps=steps, scheduler=scheduler).error for steps in (20, 100)]
    assert errors[0] > 2 * errors[1] and errors[1] < 0.05, errors


def test_a_real_network_with_motion_comes_back_closer_too(pair: Pair) -> None:
    errors = [up(pair.video(), clip(2), steps=steps, scheduler="karras").error for steps in (2, 6)]
    assert errors[1] < 0.7 * errors[0], errors


def test_part_of_the_way(pair: Pair) -> None:
    """denoise below 1: the last steps of a longer schedule, as in a KSampler."""
    model = formula(pair.plain)
    found = up(model, denoise=0.5)
    whole = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 8)
    assert torch.equal(found.sigmas, whole[-5:]) and found.error < up(model).error


# --- what stock samplers do with it -------------------------------------------------------------------------------


def test_stock_samplers_come_back_to_the_clip(pair: Pair, run_node: Callable) -> None:
    """SamplerCustom, KSampler (Advanced) and SamplerCustomAdvanced from the outputs, each the same."""
    model, latent = formula(pair.plain), clip()
    found = up(model, latent, steps=20)
    conds = {"positive": tiny_host.conditioning(model, 1), "negative": tiny_host.conditioning(model, 2)}
    (advanced,) = run_node(
        "KSamplerAdvanced", model=model, latent_image=found.latent, **conds, noise_seed=3, steps=20, cfg=1.0,
        sampler_name="ddim", scheduler="ddim_uniform", start_at_step=0, end_at_step=10000, add_noise="disable",
        return_with_leftover_noise="disable")  # fmt: skip
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")
    (guider,) = run_node("CFGGuider", model=model, cfg=1.0, **conds)
    parts = {"noise": found.noise, "guider": guider, "sampler": sampler, "sigmas": found.sigmas}
    starts = latent, {"samples": torch.zeros_like(latent["samples"])}
    noisy = [run_node("SamplerCustomAdvanced", **parts, latent_image=start)[0]["samples"] for start in starts]
    back = down(run_node, model, found)
    assert all(relative_error(other, back) < 1e-5 for other in (advanced["samples"], *noisy))
    difference = float((back - latent["samples"]).square().mean().sqrt() / latent["samples"].square().mean().sqrt())
    assert found.error == pytest.approx(difference, rel=1e-4) and 0.001 < found.error < 0.2


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("scheduler", ["ddim_uniform", "karras"])
def test_the_noise_starts_a_sampler_at_the_inverted_clip(scheduler: str, windowed: bool, pair: Pair) -> None:
    """Where the host scales noise for the highest level (karras) and where it does not; no window arranges it."""
    model, latent = formula(pair.plain), clip()
    if windowed:
        model = apply_context(model, SlidingContext(WindowPlan(length=2, overlap=1), noise=NoiseKind.SHUFFLED))
    found = up(model, latent, scheduler=scheduler, check=False)
    sampling, seen = model.get_model_object("model_sampling"), []
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": tiny_host.conditioning(model, 1)})
    spy = comfy.samplers.KSAMPLER(lambda model, x, sigmas, **rest: seen.append(x.clone()) or x)
    guider.sample(found.noise.generate_noise(latent), latent["samples"], spy, found.sigmas, seed=found.noise.seed)
    assert relative_error(seen[0], found.latent["samples"] * 0.18215) < 1e-5
    highest = bool(found.sigmas[0] >= sampling.sigma_max * (1 - 1e-5))
    assert highest == (scheduler == "karras")
    with pytest.raises(ClipError, match="is 3x4x8x8 and the inverted clip 4x4x8x8 .* went into DDIM Inversion"):
        found.noise.generate_noise(clip(3))


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "karras"])
def test_standardised_noise_is_as_fresh_noise(scheduler: str, pair: Pair) -> None:
    """Mean 0 and deviation 1 in every channel of every frame; the pattern in it and the path stay."""
    model, latent = formula(pair.plain), clip()
    latent["samples"] += 3.0
    found, other = (up(model, latent, scheduler=scheduler, keep=2, standardise=share) for share in (1.0, 0.0))
    scale = noise_scale(model.get_model_object("model_sampling"), found.sigmas)
    empty = {"samples": torch.zeros_like(latent["samples"])}
    noise, before = (x.noise.generate_noise(empty).flatten(2) for x in (found, other))
    assert noise.mean(2).abs().max() < 1e-5 and (noise.std(2, correction=0) - 1).abs().max() < 1e-5
    assert before.mean(2).abs().max() > 0.01 and (before.std(2) - 1).abs().max() > 0.01
    assert relative_error(found.latent["samples"] * 0.18215 / scale, noise.unflatten(2, (8, 8))) < 1e-5
    straight = (before - before.mean(2, keepdim=True)) / before.std(2, correction=0, keepdim=True)
    assert relative_error(noise, straight) < 1e-5
    halfway = up(model, latent, scheduler=scheduler, standardise=0.5).noise.generate_noise(empty)
    assert relative_error(halfway, standardise(before.unflatten(2, (8, 8)), 0.5)) < 1e-5
    assert torch.equal(found.path.states, other.path.states) and found.error > other.error


def test_masks_belong_to_the_noise_and_not_to_the_noisy_clip(pair: Pair, run_node: Callable) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    model, latent = formula(pair.plain), clip() | {"noise_mask": mask, "batch_index": [3, 4, 5, 6]}
    found = up(model, latent, steps=20)
    assert "noise_mask" not in found.latent and found.latent["batch_index"] == [3, 4, 5, 6]
    assert relative_error(found.latent["samples"], up(model, clip(), steps=20).latent["samples"]) == 0.0
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")
    (guider,) = run_node("BasicGuider", model=model, conditioning=tiny_host.conditioning(model, 1))
    made = run_node("SamplerCustomAdvanced", noise=found.noise, guider=guider, sampler=sampler, sigmas=found.sigmas,
                    latent_image=latent)[0]["samples"]  # fmt: skip
    same = latent["samples"][..., 4:]
    assert relative_error(made[..., 4:], same) < 1e-5 and not torch.equal(made[..., :4], latent["samples"][..., :4])


# --- every kind of model ------------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Pair], ModelPatcher]] = {
    "image": lambda pair: pair.plain,
    "motion": lambda pair: pair.video(),
    "motion, part of the run": lambda pair: pair.video(start=0.3, end=0.8),
    "two clips": lambda pair: pair.video(frames=2),
    "sliding context": lambda pair: apply_context(pair.video(), SlidingContext(WindowPlan(length=3, overlap=1))),
    "the host's windows": lambda pair: windows(pair.video(), 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str, pair: Pair) -> None:
    """Small steps near the clip, where the way up and the way down are nearly the same."""
    convention = Convention.STANDARD if "windows" in kind else Convention.RELEASED
    latent = clip()
    kept = latent["samples"].clone()
    found = up(KINDS[kind](pair), latent, steps=2, denoise=0.01, convention=convention, scheduler="normal")
    assert torch.isfinite(found.latent["samples"]).all() and found.latent["samples"].shape == (FRAMES, 4, 8, 8)
    assert found.error < 0.02 and torch.equal(latent["samples"], kept)


def test_kinds_differ(pair: Pair) -> None:
    """The way up is that of the MODEL it was given, not of the image model under it."""
    ends = {kind: up(build(pair), steps=1, check=False, scheduler="karras").latent["samples"]
            for kind, build in KINDS.items() if kind != "motion, part of the run"}  # fmt: skip
    same = [(a, b) for a in ends for b in ends if a < b and torch.equal(ends[a], ends[b])]
    assert not same


def test_sdxl_and_guidance() -> None:
    model = tiny_host.sdxl()
    negative = tiny_host.conditioning(model, 2)
    one, guided = (up(model, clip(2), steps=2, denoise=0.01, scheduler="normal", cfg=cfg, negative=negative)
                   for cfg in (1.0, 3.0))  # fmt: skip
    assert one.error < 0.02 and not torch.equal(one.latent["samples"], guided.latent["samples"])


def test_conditioning_follows_the_frame(pair: Pair, run_node: Callable) -> None:
    """A model that keeps frames apart inverts them alike in windows and all at once: prompts and hints."""
    hints = torch.rand(FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    positive, _ = run_node(
        "ControlNetApplyAdvanced", positive=tiny_host.conditioning(pair.plain, 1, batch=FRAMES), image=hints,
        negative=tiny_host.conditioning(pair.plain, 2), control_net=tiny_host.controlnet(), strength=0.8,
        start_percent=0.0, end_percent=0.9)  # fmt: skip
    whole, parts, bare = (
        up(model, steps=2, positive=conds, check=False).latent["samples"]
        for model, conds in ((pair.plain, positive),
                             (apply_context(pair.plain, SlidingContext(WindowPlan(length=2, overlap=1))), positive),
                             (pair.plain, tiny_host.conditioning(pair.plain, 1, batch=FRAMES))))  # fmt: skip
    assert relative_error(parts, whole) < 1e-4 and relative_error(bare, whole) > 1e-3


def test_prompts_that_travel_travel_on_the_way_up(pair: Pair) -> None:
    text = StandInClip(pair.plain)
    model = apply_context(pair.plain, SlidingContext(WindowPlan(length=5, overlap=1)))
    moving, fixed = (up(model, clip(len(MIXED)), steps=1, positive=conds, check=False).latent["samples"]
                     for conds in (travel(text), per_frame(text, MIXED)))  # fmt: skip
    assert relative_error(moving, fixed) < 1e-5


def test_schedules_of_hooks_are_read_at_the_level(pair: Pair) -> None:
    """Keyframes go forward only; on the way up they are those of the way down, last one first."""
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.WeightHook())
    hooks.hooks[0].need_weight_init = False
    hooks.hooks[0].weights = {"diffusion_model.input_blocks.1.0.in_layers.2.weight": (torch.ones(32, 32, 3, 3),)}
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.5, 0.3), (0.0, 0.6)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    model, told = formula(pair.plain), []
    inner = model.model_options["model_function_wrapper"]
    network = pair.plain.model.diffusion_model.input_blocks[1][0].in_layers[2]
    original = network.weight.clone()
    model.set_model_unet_function_wrapper(
        lambda f, call: (told.append((hooks.hooks[0].strength, bool((network.weight != original).any()))),
                         inner(f, call))[1])  # fmt: skip
    up(model, steps=5, positive=[[tiny_host.conditioning(model, 1)[0][0], {"hooks": hooks}]])
    assert told[:5] == told[5:][::-1] and len({strength for strength, _ in told}) == 3, told
    assert all(changed == (strength > 0.0) for strength, changed in told)


def test_memory_is_planned_for_one_window(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory",
                        lambda model, shape, *rest: asked.append(shape[0]) or real(model, shape, *rest))  # fmt: skip
    up(apply_context(formula(pair.plain), SlidingContext(WindowPlan(length=2, overlap=1))))
    assert asked == [2, 2], "once up and once down"


# --- the run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(fragile_pair: Pair) -> Iterator[tuple[ModelPatcher, list]]:
    calls: list[int] = []

    def stop(apply_model: Callable, call: dict) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()
        return apply_model(call["input"], call["timestep"], **call["c"])

    model = fragile_pair.video()
    model.set_model_unet_function_wrapper(stop)
    yield model, calls


def test_cancel_answers_within_the_step_and_leaves_nothing(stopped: tuple[ModelPatcher, list]) -> None:
    model, calls = stopped
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        up(model)
    assert len(calls) == 3
    assert torch.isfinite(up(model, check=False).latent["samples"]).all() and len(calls) == 7


def test_progress_counts_both_ways(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    begun: list[int] = []

    def prepare(model: Any, steps: int, *rest: Any) -> Callable:
        begun.append(steps)
        return lambda step, x0, x, total: told.append((step, total))

    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    up(formula(pair.plain))
    up(formula(pair.plain), check=False)
    assert begun == [8, 4] and told == [*((i, 8) for i in range(8)), *((i, 4) for i in range(4))]


# --- sentences ----------------------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[Callable[[Pair], ModelPatcher], dict, dict, str]] = {
    "no clip": (lambda pair: pair.plain, {"samples": torch.zeros(4, 4, 8, 8)}, {}, "The latent is empty.*VAE Encode"),
    "no frames": (lambda pair: pair.plain, {"samples": torch.zeros(0, 4, 8, 8)}, {}, "The latent is empty"),
    "another VAE": (lambda pair: pair.plain, {"samples": torch.ones(4, 16, 8, 8)}, {}, "16 channels .* samples 4"),
    "guidance alone": (lambda pair: pair.plain, clip(), {"cfg": 7.5}, "cfg is 7.5 and needs a negative prompt"),
    "part of the way": (lambda pair: pair.plain, clip(), {"standardise": 0.75, "denoise": 0.5},
                        "standardise is 0.75 and denoise is 0.5"),
    "clip by clip": (lambda pair: apply_reuse(pair.plain, Reuse(4, 2)), clip(), {}, "has Reuse and Diffuse"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_computed(mistake: str, pair: Pair) -> None:
    build, latent, settings, sentence = MISTAKES[mistake]
    model = build(pair).clone()
    model.set_model_unet_function_wrapper(lambda *args: pytest.fail("the model was called"))
    with pytest.raises((ClipError, ModelMismatchError), match=sentence):
        up(model, latent, **settings)


@pytest.mark.parametrize(("sampling", "name"), [("lcm", "LCM"), ("x0", "X0")])
def test_models_that_predict_something_else_are_refused(
    sampling: str, name: str, pair: Pair, run_node: Callable
) -> None:
    (model,) = run_node("ModelSamplingDiscrete", model=pair.plain, sampling=sampling, zsnr=False)
    with pytest.raises(ModelMismatchError, match=f"sampled as {name}, and DDIM inversion is right only for"):
        up(model)
    (flow,) = run_node("ModelSamplingSD3", model=pair.plain, shift=3.0)
    with pytest.raises(ModelMismatchError, match="sampled as CONST"):
        up(flow)


def test_the_node_says_what_it_found(pair: Pair, pack_nodes: dict[str, type]) -> None:
    model, node = formula(pair.plain), pack_nodes[NODE].PREPARE_CLASS_CLONE(None)
    inputs = {"model": model, "positive": tiny_host.conditioning(model, 1), "latent": clip()}
    given = node.execute(**inputs, **WIDGETS)
    latent, sigmas, noise, error, path = given.result
    expected = up(model, keep=16)
    assert torch.equal(latent["samples"], expected.latent["samples"]) and torch.equal(sigmas, expected.sigmas)
    assert error == expected.error and path.states.shape == (5, FRAMES, 4, 8, 8) and noise.seed == 0
    assert given.ui.as_dict()["text"][0] == (
        f"4 steps up to noise level 4.12. Sampled back without edits, the latents differ by "
        f"{100 * error:.3g} % (relative RMSE).")  # fmt: skip
    *_, error, path = node.execute(**inputs, **WIDGETS | {"reconstruct": False, "keep_frames": 0}).result
    assert error != error and path.states.shape == (5, 0, 4, 8, 8)
    for name in ("scheduler", "convention"):
        with pytest.raises(ValueError, match=f"{name} is 'other'"):
            node.execute(**inputs, **WIDGETS | {name: "other"})
