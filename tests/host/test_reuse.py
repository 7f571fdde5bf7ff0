"""Reuse and Diffuse on the host's samplers. Most tests give the host's model a formula for a network, quick and exact,
in which every frame of a clip sees the others; the scheme is then written out by hand beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, relative_error
from latentmotion.bench import reuse as bench
from latentmotion.host import options
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.reuse import ONE_STEP_SAMPLERS, apply_reuse, check_sampler
from latentmotion.motion_modules.errors import ClipError, ModelMismatchError
from latentmotion.sampling.reuse import Guidance, Reuse
from latentmotion.sampling.windows import WindowPlan
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

N, CLIPS, STEPS = 4, 3, 4
APART = Reuse(N, 0, 0.0, 0.0)  # clips that know nothing of each other
CLOSE = 2e-5


def denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """What stands for the network: from one clip (n, c, h, w) at one noise level to its latents."""
    z = x / (1 + sigma**2).sqrt()
    return torch.tanh(z + 0.5 * z.roll(1, 0) - 0.3 * z.mean(0) + 0.1 * torch.log1p(sigma))


def formula(plain: ModelPatcher) -> ModelPatcher:
    model = plain.clone()

    def wrapper(apply_model: Callable, call: dict) -> Tensor:
        parts = call["input"].chunk(len(call["cond_or_uncond"]))
        return torch.cat([denoised(part, call["timestep"][0]) for part in parts])

    model.set_model_unet_function_wrapper(wrapper)
    return model


def noise_of(frames: int = N * CLIPS, seed: int = 0) -> Tensor:
    return torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def draw(model: ModelPatcher, noise: Tensor, sampler: str = "euler", start: Tensor | None = None, cfg: float = 1.0,
         seed: int = 0, steps: int = STEPS, **options: Any) -> Tensor:  # fmt: skip
    """The host's KSampler on this noise."""
    conds = tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2)
    begin = torch.zeros_like(noise) if start is None else start
    return comfy.sample.sample(model, noise, steps, cfg, sampler, "normal", *conds, begin, seed=seed,
                               disable_pbar=True, **options)  # fmt: skip


def sigmas_of(model: ModelPatcher) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)


def by_hand(reuse: Reuse, fresh: list[Tensor], sigmas: Tensor) -> Tensor:
    """The released loop in DDIM's own scale, z = x sqrt(alphas_cumprod), with every state of every frame stored."""
    kept = 1 / (1 + sigmas**2)
    m, steps = reuse.prompt_frames, len(sigmas) - 1
    share = reuse.alpha / (1 + reuse.alpha**2) ** 0.5
    clips: list[Tensor] = []
    stored: list[Tensor] = []
    for i, noise in enumerate(fresh):
        z = noise.clone()
        if i:
            old = stored[0].flip(0)
            z = torch.cat([old[:m], share * old[m:] + noise[m:] / (1 + reuse.alpha**2) ** 0.5])
        states = []
        for s in range(steps):
            led = [j for j in range(m) if s < (m - j) * (steps / m) * reuse.beta - 1e-9]
            for j in led if i and reuse.guidance is Guidance.RELEASED else []:
                z[j] = stored[s].flip(0)[j]
            states.append(z.clone())
            clean = denoised(z / kept[s].sqrt(), sigmas[s])
            epsilon = (z - kept[s].sqrt() * clean) / (1 - kept[s]).sqrt()
            z = kept[s + 1].sqrt() * clean + (1 - kept[s + 1]).sqrt() * epsilon
            for j in led if i and reuse.guidance is Guidance.PAPER else []:
                z[j] = stored[s + 1].flip(0)[j]
        stored = [*states, z.clone()]
        clips.append(z)
    return torch.cat(clips) / 0.18215


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("guidance", Guidance)
@pytest.mark.parametrize(("prompt", "alpha", "beta"), [(2, 4.0, 0.5), (3, 1.0, 1.0), (4, 2.0, 0.75), (1, 0.0, 0.0)])
def test_clips_are_those_of_the_written_out_loop(
    sampler: str, guidance: Guidance, prompt: int, alpha: float, beta: float, pair: Pair
) -> None:
    reuse, noise = Reuse(N, prompt, alpha, beta, guidance), noise_of()
    made = draw(apply_reuse(formula(pair.plain), reuse), noise, sampler)
    expected = by_hand(reuse, list(noise.split(N)), sigmas_of(pair.plain))
    assert relative_error(made, expected) < CLOSE
    assert relative_error(made[:N], draw(formula(pair.plain), noise[:N], sampler)) == 0.0
    if beta:
        assert relative_error(made, draw(apply_reuse(formula(pair.plain), APART), noise, sampler)) > 0.05


@pytest.mark.parametrize("sampler", [*ONE_STEP_SAMPLERS, "ddim"])
def test_steps_taken_one_by_one_are_the_hosts_own(sampler: str, pair: Pair) -> None:
    """Bit for bit, each clip with a seed of its own; and once led, the last frame may reach the next clip whole."""
    model, noise = formula(pair.plain), noise_of()
    made = draw(apply_reuse(model, APART), noise, sampler, cfg=2.0)
    alone = [draw(model, part, sampler, cfg=2.0, seed=i) for i, part in enumerate(noise.split(N))]
    assert torch.equal(made, torch.cat(alone))
    led = draw(apply_reuse(model, Reuse(N, 2, 1.0, 1.0)), noise, sampler, cfg=2.0)
    assert torch.equal(led[N], led[N - 1]) and torch.equal(led[:N], made[:N]) and not torch.equal(led[N:], made[N:])


def test_other_samplers_are_refused_by_name_before_anything_is_computed(pair: Pair) -> None:
    model = pair.plain.clone()
    model.set_model_unet_function_wrapper(lambda *args: pytest.fail("the model was called"))
    model = apply_reuse(model, Reuse(N, 2))
    names = set(comfy.samplers.SAMPLER_NAMES) - {*ONE_STEP_SAMPLERS, "ddim"}
    assert {"dpmpp_2m", "uni_pc", "dpm_adaptive", "lms", "heunpp2"} <= names
    for name in names:
        function = getattr(comfy.samplers.sampler_object(name).sampler_function, "__name__", "").removesuffix(
            "_function"
        )
        with pytest.raises(
            ModelMismatchError, match=f"the sampler {function.removeprefix('sample_')}.*Choose one of ddim, "
        ):
            draw(model, noise_of(), name)
    stranger = comfy.samplers.KSAMPLER(lambda *args, **kw: None)
    stranger.sampler_function.__name__ = "sample_euler"
    with pytest.raises(ModelMismatchError, match="the sampler euler"):
        check_sampler(stranger)
    with pytest.raises(ModelMismatchError, match="the sampler Sampler"):
        check_sampler(comfy.samplers.Sampler())
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 0.5})
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2))
    with pytest.raises(ModelMismatchError, match="s_churn"):
        guider.sample(noise_of(), torch.zeros(N * CLIPS, 4, 8, 8), sampler, sigmas_of(model))


def test_one_clip_is_sampled_as_without_the_node(pair: Pair) -> None:
    assert torch.equal(draw(apply_reuse(formula(pair.plain), Reuse(N, 2)), noise_of(N), "dpmpp_2m"),
                       draw(formula(pair.plain), noise_of(N), "dpmpp_2m"))  # fmt: skip


def test_motion_sees_one_clip_after_the_other(pair: Pair) -> None:
    model, noise = pair.video(), noise_of(2 * N)
    made = draw(apply_reuse(model, APART), noise, cfg=2.0, steps=2)
    assert relative_error(made, torch.cat([draw(model, part, cfg=2.0, steps=2) for part in noise.split(N)])) < 1e-5
    led = draw(apply_reuse(model, Reuse(N, 1, 4.0, 1.0)), noise, cfg=2.0, steps=2)
    assert torch.equal(led[N], led[N - 1]) and not torch.equal(led[N + 1], led[N - 2])


def test_part_of_the_noise(pair: Pair) -> None:
    """denoise below 1: the clips start from latents of their own, in order, and are still led."""
    model, start = formula(pair.plain), noise_of(seed=1)
    made = draw(apply_reuse(model, APART), noise_of(), start=start, denoise=0.5)
    alone = [draw(model, n, start=s, denoise=0.5) for n, s in zip(noise_of().split(N), start.split(N), strict=True)]
    assert torch.equal(made, torch.cat(alone))
    led = draw(apply_reuse(model, Reuse(N, 2, 1.0, 1.0)), noise_of(), start=start, denoise=0.5)
    assert torch.equal(led[N], led[N - 1]) and not torch.equal(led[N + 1], led[N - 2])


def test_split_steps_are_the_unsplit_run(pair: Pair) -> None:
    """Led in the first two of four steps, in one run, or in all steps of the first of two runs."""
    model, noise = formula(pair.plain), noise_of()
    whole = draw(apply_reuse(model, Reuse(N, 1, 2.0, 0.5)), noise)
    model = apply_reuse(model, Reuse(N, 1, 2.0, 1.0))
    half = draw(model, noise, last_step=2)
    both = draw(model, torch.zeros_like(noise), start=half, start_step=2)
    assert relative_error(both, whole) < 1e-5


# --- what follows the frame ---------------------------------------------------------------------------------------


def per_frame(seed: int, *shape: int) -> Tensor:
    return torch.rand(N * CLIPS, *shape, generator=torch.Generator().manual_seed(seed))


def test_prompts_hints_and_masks_follow_the_frame(pair: Pair, run_node: Callable) -> None:
    """A model that keeps frames apart draws the same clip after clip as all at once."""
    positive, negative = run_node(
        "ControlNetApplyAdvanced",
        positive=tiny_host.conditioning(pair.plain, 1, batch=N * CLIPS),
        negative=tiny_host.conditioning(pair.plain, 2),
        control_net=tiny_host.controlnet(),
        image=per_frame(1, 64, 64, 3),
        strength=0.8,
        start_percent=0.0,
        end_percent=1.0,
    )
    positive = [[positive[0][0], positive[0][1] | {"mask": per_frame(2, 8, 8), "mask_strength": 1.0}]]
    extras = {"positive": positive, "negative": negative, "noise_mask": per_frame(3, 1, 8, 8).round()}
    whole, parts = (
        tiny_host.sample(model, N * CLIPS, steps=1, start=per_frame(4, 4, 8, 8), **extras)
        for model in (pair.plain, apply_reuse(pair.plain, APART))
    )
    assert relative_error(parts, whole) < 1e-4


def test_neighbours_read_the_frames_of_the_clip(pair: Pair) -> None:
    read = []

    def listen(executor: Callable, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: dict) -> list:
        read.append((x.shape[0], model_options["transformer_options"]["ad_params"]))
        return executor(model, conds, x, timestep, model_options)

    model = apply_reuse(pair.video(), Reuse(N, 2))
    model.add_wrapper_with_key("calc_cond_batch", "listener", listen)
    tiny_host.sample(model, N * CLIPS, steps=1)
    assert [params["sub_idxs"] for _, params in read] == [list(range(i * N, i * N + N)) for i in range(CLIPS)]
    assert all((params["full_length"], params["context_length"], n) == (N * CLIPS, N, N) for n, params in read)


def test_schedules_in_the_conditioning_begin_anew_with_each_clip(pair: Pair) -> None:
    """Keyframes of a hook only ever go forward within a run; a weight of 0 from the middle on must come back."""
    lora = {"diffusion_model.input_blocks.1.0.in_layers.2.weight": (torch.ones(32, 32, 3, 3),)}
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.WeightHook())
    hooks.hooks[0].weights = lora
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(frames)
    strengths = []
    model = formula(pair.plain)
    inner = model.model_options["model_function_wrapper"]
    model.set_model_unet_function_wrapper(
        lambda f, call: (strengths.append(hooks.hooks[0].strength), inner(f, call))[1]
    )
    positive = [[tiny_host.conditioning(model, 1)[0][0], {"hooks": hooks}]]
    tiny_host.sample(apply_reuse(model, APART), 2 * N, steps=STEPS, cfg=1.0, positive=positive)
    assert strengths[:STEPS] == strengths[STEPS:] and set(strengths) == {0.0, 1.0}


def test_strength_per_frame_is_that_of_the_whole_video(pair: Pair) -> None:
    """Strength 1 in the first clip, 0 in the second: only the second is that of the image model."""
    strength = options.frame_values(1.0, [1.0] * N + [0.0] * N)
    made, image = (
        draw(apply_reuse(model, APART), noise_of(2 * N), steps=1)
        for model in (pair.video(strength=strength), pair.plain)
    )
    same = [relative_error(made[i * N : i * N + N], image[i * N : i * N + N]) < 1e-5 for i in range(2)]
    assert same == [False, True]


# --- going on from a finished clip --------------------------------------------------------------------------------


def test_a_finished_clip_leads_the_first_one(pair: Pair) -> None:
    """The model is shown the old frames, reversed, at the noise level of the step and with the new clip's noise."""
    seen: list[Tensor] = []
    model, old, noise = formula(pair.plain), noise_of(6, seed=7), noise_of()
    inner = model.model_options["model_function_wrapper"]
    model.set_model_unet_function_wrapper(lambda f, call: (seen.append(call["input"].clone()), inner(f, call))[1])
    latent = {"samples": old.clone()}
    made = draw(apply_reuse(model, Reuse(N, 2, 4.0, 1.0), latent), noise)
    sigmas, scaled = sigmas_of(model), old.flip(0) * 0.18215
    for s in range(1, STEPS):
        count = 2 if s <= 2 else 1
        assert relative_error(seen[s][:count], (scaled[:2] + sigmas[s] * noise[:2])[:count]) < 1e-5
    assert relative_error(made[0], old[-1]) < 1e-5 and torch.equal(made[N], made[N - 1])
    assert torch.equal(latent["samples"], old)
    assert relative_error(made, draw(apply_reuse(model, Reuse(N, 2, 4.0, 1.0)), noise)) > 0.05


@pytest.mark.parametrize(("shape", "sentence"), [
    ((1, 4, 8, 8), "continue_from has 1 frames, fewer than the 2 prompt_frames"),
    ((6, 4, 8, 16), "frames of 4x8x16 .* the one at the sampler 4x8x8")])  # fmt: skip
def test_a_clip_that_cannot_be_continued(shape: tuple, sentence: str, pair: Pair) -> None:
    with pytest.raises(ClipError, match=sentence):
        draw(apply_reuse(pair.plain, Reuse(N, 2), {"samples": torch.zeros(shape)}), noise_of())


# --- the run ------------------------------------------------------------------------------------------------------


def test_progress_counts_the_steps_of_all_clips(pair: Pair) -> None:
    told: list[tuple[int, int, int]] = []

    def listen(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        told.append((step, total, x0.shape[0]))
        listen.last = x0

    made = draw(apply_reuse(formula(pair.plain), Reuse(N, 2)), noise_of(), callback=listen)
    total = STEPS * CLIPS
    assert told == [(step, total, N if step < total - 1 else N * CLIPS) for step in range(total)]
    assert relative_error(listen.last / 0.18215, made) < 0.3, "the last report holds every clip, before the last lead"
    assert relative_error(listen.last[:N] / 0.18215, made[:N]) < 1e-5


@pytest.fixture
def stopped(fragile_pair: Pair) -> Iterator[tuple[ModelPatcher, list]]:
    calls: list[int] = []
    model = formula(fragile_pair.plain)
    inner = model.model_options["model_function_wrapper"]

    def stop(apply_model: Callable, call: dict) -> Tensor:
        calls.append(1)
        if len(calls) == STEPS + 1:
            comfy.model_management.interrupt_current_processing()
        return inner(apply_model, call)

    model.set_model_unet_function_wrapper(stop)
    yield apply_reuse(model, Reuse(N, 2)), calls


def test_cancel_answers_at_the_next_step_and_leaves_nothing(stopped: tuple[ModelPatcher, list]) -> None:
    model, calls = stopped
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2))
    guider.set_cfg(1.0)
    sampler, start = comfy.samplers.sampler_object("euler"), torch.zeros(N * CLIPS, 4, 8, 8)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        guider.sample(noise_of(), start, sampler, sigmas_of(model), disable_pbar=True)
    assert len(calls) == STEPS + 1
    assert sampler.sampler_function is comfy.samplers.sampler_object("euler").sampler_function
    again = guider.sample(noise_of(), start, sampler, sigmas_of(model), disable_pbar=True)
    assert torch.equal(again, draw(model, noise_of()))


@pytest.mark.parametrize(("frames", "near"), [(10, 8), (3, 4), (14, 16)])
def test_a_batch_of_no_whole_clips_is_refused(frames: int, near: int, pair: Pair) -> None:
    with pytest.raises(
        ClipError, match=f"The batch holds {frames} frames, .* clips of 4. Set batch_size .* to {near},"
    ):
        draw(apply_reuse(pair.plain, Reuse(N, 2)), noise_of(frames))


def test_what_does_not_go_together_is_refused(pair: Pair) -> None:
    both = apply_context(apply_reuse(pair.plain, Reuse(N, 2)), SlidingContext(WindowPlan(length=8)))
    with pytest.raises(ClipError, match="context windows as well as Reuse and Diffuse"):
        draw(both, noise_of())
    guider = comfy.samplers.CFGGuider(apply_reuse(pair.plain, Reuse(1, 0)))
    guider.set_conds(tiny_host.conditioning(pair.plain, 1), tiny_host.conditioning(pair.plain, 2))
    video = torch.zeros(1, 4, 4, 8, 8)
    with pytest.raises(ClipError, match="have a time axis"):
        guider.sample(video, video, comfy.samplers.sampler_object("euler"), sigmas_of(pair.plain))


def test_memory_is_planned_for_one_clip(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory",
                        lambda model, shape, *rest: asked.append(shape[0]) or real(model, shape, *rest))  # fmt: skip
    draw(apply_reuse(formula(pair.plain), Reuse(N, 2)), noise_of())
    assert asked == [N]


def test_the_node_sets_it_up_and_leaves_its_model_alone(pair: Pair, run_node: Callable) -> None:
    model = formula(pair.plain)
    widgets = {"clip_length": N, "prompt_frames": 2, "alpha": 1.0, "beta": 0.5}
    (first,) = run_node("LatentMotionReuseAndDiffuse", model=model, guidance="paper", **widgets)
    (second,) = run_node("LatentMotionReuseAndDiffuse", model=first, guidance="released code", **widgets)
    paper, released = (Reuse(N, 2, 1.0, 0.5, guidance) for guidance in Guidance)
    expected = draw(apply_reuse(model, paper), noise_of())
    assert torch.equal(draw(first, noise_of()), expected)
    assert torch.equal(draw(second, noise_of()), draw(apply_reuse(model, released), noise_of()))
    assert not torch.equal(draw(second, noise_of()), expected) and not torch.equal(draw(model, noise_of()), expected)
    with pytest.raises(ValueError, match="guidance is 'other'"):
        run_node("LatentMotionReuseAndDiffuse", model=model, guidance="other", **widgets)
    assert options.known_reuse(16, 4) is True and options.known_reuse(None, 4) is True
    assert "prompt_frames is 20" in options.known_reuse(16, 20)


def test_the_measurement_compares_a_clip_with_one_sampled_apart_behind_the_same_frames() -> None:
    """Behind a video that is drawn the jump of clips sampled apart is another one."""
    jumps = {"naive": 4.0, "default": 1.0, "continue_from": 2.0, "continue_path": 2.0, "video_naive": 8.0}
    made = {name: [bench.Video(jump, 0.1, 3 * jump, 1.0, 1.0, True)] for name, jump in jumps.items()}
    found = bench.all_figures(made)
    for key in ("latent", "centroid"):
        assert found[f"reuse.seam_vs_naive.{key}"] == found[f"reuse.continue_path.{key}"] == pytest.approx(0.25)
        assert found[f"reuse.continue_from.{key}"] == pytest.approx(0.5)
    assert "continue_path" in bench.table(made)
