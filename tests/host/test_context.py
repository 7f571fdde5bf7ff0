"""Sliding Context on the host's samplers. A model that keeps frames apart must draw the same with and without windows:
that proves the cutting of everything per frame; with motion the windows themselves are what is looked at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import pytest
import tiny_host
import torch
from helpers_features import windowed as context_windows
from helpers_motion import SMALL, SMALL_WIDTHS, Pair, inflate, motion_module, relative_error
from latentmotion.host import conditioning, options
from latentmotion.host.attention import FrameAttention, apply_frame_attention
from latentmotion.host.conditioning import ControlSlices, cut_conds
from latentmotion.host.context import ContextWindow, SlidingContext, apply_context, step_of
from latentmotion.motion_modules.animatediff.spec import HOTSHOT_XL, V1, V2, Variant
from latentmotion.motion_modules.call import MotionCall
from latentmotion.motion_modules.errors import ClipError
from latentmotion.sampling.frame_values import frame_values
from latentmotion.sampling.fuse import FuseMethod
from latentmotion.sampling.noise import NoiseKind
from latentmotion.sampling.windows import WindowPlan, WindowSchedule

pytest_plugins = ["helpers_fixtures"]

FRAMES, LENGTH, OVERLAP = 11, 4, 2


def windowed(model, schedule: WindowSchedule = WindowSchedule.STATIC, fuse: FuseMethod = FuseMethod.PYRAMID, **more):
    plan = WindowPlan(schedule, more.pop("length", LENGTH), more.pop("overlap", OVERLAP), **more.pop("plan", {}))
    return apply_context(model, SlidingContext(plan, fuse, **more))


def per_frame(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(FRAMES, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", WindowSchedule)
@pytest.mark.parametrize("fuse", FuseMethod)
def test_frames_kept_apart_are_drawn_as_without_windows(schedule: WindowSchedule, fuse: FuseMethod, pair: Pair) -> None:
    positive = tiny_host.conditioning(pair.plain, 1, batch=FRAMES)  # another prompt for every frame
    whole = tiny_host.sample(pair.plain, FRAMES, positive=positive)
    parts = tiny_host.sample(windowed(pair.plain, schedule, fuse), FRAMES, positive=positive)
    assert relative_error(parts, whole) < 1e-4


def test_hints_and_masks_follow_the_frame(pair: Pair, run_node: Callable) -> None:
    positive, negative = run_node(
        "ControlNetApplyAdvanced",
        positive=tiny_host.conditioning(pair.plain, 1),
        negative=tiny_host.conditioning(pair.plain, 2),
        control_net=tiny_host.controlnet(),
        image=per_frame(1, 64, 64, 3),
        strength=0.8,
        start_percent=0.0,
        end_percent=1.0,
    )
    positive = [[positive[0][0], positive[0][1] | {"mask": per_frame(2, 8, 8), "mask_strength": 1.0}]]
    whole, parts = (
        tiny_host.sample(model, FRAMES, positive=positive, negative=negative)
        for model in (pair.plain, windowed(pair.plain))
    )
    assert relative_error(parts, whole) < 1e-4


def test_hints_of_a_long_clip_are_not_kept_in_every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    control = tiny_host.controlnet(**SMALL)
    control.cond_hint_original = per_frame(1, 3, 64, 64)
    row = control.cond_hint_original[0].nbytes
    monkeypatch.setattr(conditioning, "MOST_KEPT", 9 * row)
    slices, parts = ControlSlices(), []
    for start in (0, 1, 2, 3, 0):
        frames = list(range(start, start + LENGTH))
        part = slices.cut(control, frames)
        assert torch.equal(part.cond_hint_original, control.cond_hint_original[frames])
        assert slices.cut(control, frames) is part, "prompts of a window share it"
        parts.append(part)
    assert slices.kept_bytes == 8 * row and parts[4] is parts[0], "two windows are kept"
    assert slices.cut(control, [2, 3, 4, 5]) is not parts[2]


def test_inpainting_mask_follows_the_frame(pair: Pair) -> None:
    mask, start = per_frame(3, 1, 8, 8).round(), per_frame(4, 4, 8, 8)
    whole, parts = (
        tiny_host.sample(model, FRAMES, start=start, noise_mask=mask) for model in (pair.plain, windowed(pair.plain))
    )
    assert relative_error(parts, whole) < 1e-4


def test_boxes_follow_the_frame() -> None:
    """GLIGEN boxes given per frame, in the host's form for them, and such that hold for all frames."""
    window, x = ContextWindow([5, 6, 0], 0, 7), torch.zeros(7, 4, 2, 2)
    conds = [{"gligen": ("position_batched", "network", [f"box {i}" for i in range(7)])},
             {"gligen": ("position", "network", ["box"])}]  # fmt: skip
    cut = cut_conds(conds, x, window, ControlSlices(), None)
    assert [cond["gligen"][2] for cond in cut] == [["box 5", "box 6", "box 0"], ["box"]]
    assert len(conds[0]["gligen"][2]) == 7


@pytest.mark.parametrize("variant", [V1, V2, HOTSHOT_XL], ids=lambda variant: variant.name)
def test_a_window_is_a_clip_of_its_own(variant: Variant) -> None:
    """Also for modules whose norms see all frames: side by side, windows are clips of the same noise."""
    image = tiny_host.sd15(**SMALL)
    module = motion_module(widths=SMALL_WIDTHS, layers=1, variant=variant)
    video = inflate(image, module)
    start = per_frame(5, 4, 8, 8)[: 2 * LENGTH]
    settings = {"steps": 1, "cfg": 1.0, "denoise": 0.6}
    side_by_side = windowed(video, WindowSchedule.BATCHED, overlap=0, noise=NoiseKind.REPEATED)
    whole = tiny_host.sample(side_by_side, 2 * LENGTH, start=start, **settings)
    clips = [tiny_host.sample(video, LENGTH, start=part, **settings) for part in start.split(LENGTH)]
    assert relative_error(whole, torch.cat(clips)) < 1e-4
    assert relative_error(clips[0], tiny_host.sample(image, LENGTH, start=start[:LENGTH], **settings)) > 1e-3


def test_strength_per_frame_follows_the_window(pair: Pair) -> None:
    """Motion on the last 7 of 11 frames only: the window before them is the image model's, those within are not."""
    video = pair.video(strength=frame_values(1.0, [0.0] * 4 + [1.0] * 7))
    found = tiny_host.sample(windowed(video, fuse=FuseMethod.FLAT, overlap=0), FRAMES, steps=1)
    plain = tiny_host.sample(pair.plain, FRAMES, steps=1)
    assert relative_error(found[:4], plain[:4]) < 1e-5 and relative_error(found[8:], plain[8:]) > 1e-3


@pytest.mark.parametrize("sampler", ["dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "heun", "dpmpp_2m", "ddim", "lcm"])
def test_samplers_that_look_between_steps(sampler: str, pair: Pair) -> None:
    whole, parts = (
        tiny_host.sample(model, FRAMES, sampler=sampler, steps=3)
        for model in (pair.plain, windowed(pair.plain, WindowSchedule.UNIFORM))
    )
    assert relative_error(parts, whole) < 1e-4


@pytest.mark.parametrize("overlap", [0, 1, LENGTH - 1])
def test_motion_sees_windows_and_nothing_longer(overlap: int, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    transformer = next(iter(pair.module.patcher.model.transformers().values()))
    hook = transformer.register_forward_pre_hook(lambda module, args: seen.append(_frames_of(args)))
    try:
        long = tiny_host.sample(windowed(pair.video(), overlap=overlap), FRAMES)
        short = tiny_host.sample(windowed(pair.video(), overlap=overlap, length=FRAMES), FRAMES)
    finally:
        hook.remove()
    assert set(seen) == {LENGTH, FRAMES}, "windows of four, then the whole clip in one"
    assert torch.equal(short, tiny_host.sample(pair.video(), FRAMES)), "a clip as long as the window needs no windows"
    assert relative_error(long, short) > 1e-3


def _frames_of(args: tuple) -> int:
    return next(arg.frames for arg in args if isinstance(arg, MotionCall))


def test_overlap_and_noise_change_the_clip_and_seeds_repeat_it(pair: Pair) -> None:
    variants = [
        windowed(pair.video()),
        windowed(pair.video(), overlap=0),
        windowed(pair.video(), noise=NoiseKind.SHUFFLED),
        windowed(pair.video(), noise=NoiseKind.REPEATED),
        windowed(pair.video(), WindowSchedule.LOOPED),
    ]
    clips = [tiny_host.sample(model, FRAMES) for model in variants]
    for i, clip in enumerate(clips):
        assert torch.equal(clip, tiny_host.sample(variants[i], FRAMES))
        assert all(relative_error(clip, other) > 1e-3 for other in clips[:i])


def test_closed_loop_ties_the_last_frame_to_the_first(pair: Pair) -> None:
    """A change of the first frame's prompt reaches the last frame only through a window across the seam."""
    reached, frames = {}, 10  # windows of four, two apart, end with the clip
    for closed in (False, True):
        model = windowed(pair.video(), WindowSchedule.LOOPED, plan={"closed_loop": closed})
        clips = []
        for seed in (1, 5):
            text = torch.cat(
                [
                    tiny_host.conditioning(pair.plain, seed)[0][0],
                    *(tiny_host.conditioning(pair.plain, 1)[0][0] for _ in range(frames - 1)),
                ]
            )
            clips.append(tiny_host.sample(model, frames, steps=1, positive=[[text, {}]]))
        reached[closed] = not torch.equal(clips[0][-1], clips[1][-1])
    assert reached == {False: False, True: True}


def test_neighbours_read_the_window(pair: Pair) -> None:
    read = []

    def listen(executor, model, conds, x, timestep, model_options):
        read.append((x.shape[0], model_options["transformer_options"]["ad_params"]))
        return executor(model, conds, x, timestep, model_options)

    model = windowed(pair.video())
    model.add_wrapper_with_key("calc_cond_batch", "listener", listen)
    tiny_host.sample(model, FRAMES, steps=1)
    assert [params["sub_idxs"] for _, params in read] == WindowPlan(length=LENGTH, overlap=OVERLAP).windows(FRAMES)
    assert all(params["full_length"] == FRAMES and params["context_length"] == n == LENGTH for n, params in read)


def test_cancel_answers_between_windows_and_leaves_nothing(fragile_pair: Pair) -> None:
    calls = []

    def stop(executor, *args):
        calls.append(1)
        comfy.model_management.interrupt_current_processing()
        return executor(*args)

    model = windowed(fragile_pair.video())
    model.add_wrapper_with_key("calc_cond_batch", "stopper", stop)
    before = dict(model.model_options["transformer_options"])
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny_host.sample(model, FRAMES)
    assert len(calls) == 1
    assert model.model_options["transformer_options"].keys() == before.keys()


def test_progress_counts_windows_and_never_goes_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, *rest: told.append(value))
    tiny_host.sample(windowed(pair.video()), FRAMES, sampler="heun", steps=2)
    windows = len(WindowPlan(length=LENGTH, overlap=OVERLAP).windows(FRAMES))
    assert told == sorted(told) and len(set(told)) == 2 * windows


def test_five_dimensional_latents_are_cut_along_time() -> None:
    """A stand-in for a video model: adds its per-frame conditioning, so windows must agree with the whole."""
    x, extra = torch.randn(1, 4, 9, 2, 2), torch.randn(1, 4, 9, 2, 2)
    conds = [[{"model_conds": {"c_concat": comfy.conds.CONDRegular(extra)}}], None]
    shapes = []

    def calc(model, conds, x, timestep, model_options):
        shapes.append(tuple(x.shape))
        return [x + conds[0][0]["model_conds"]["c_concat"].cond, torch.zeros_like(x)]

    context = SlidingContext(WindowPlan(length=4, overlap=1))
    options_of_run = {"transformer_options": {"sample_sigmas": torch.tensor([2.0, 1.0, 0.0])}}
    assert context.should_use_context(None, conds, x, torch.tensor([2.0]), options_of_run)
    out = context.execute(calc, None, conds, x, torch.tensor([2.0]), options_of_run)
    torch.testing.assert_close(out[0], x + extra)
    assert set(shapes) == {(1, 4, 4, 2, 2)} and not out[1].any()


class PassingModel:
    """As much of a video model as the host's batching of conditionings asks for; it predicts what `c_concat` holds."""

    current_patcher = SimpleNamespace(
        prepare_state=lambda *args: None, apply_hooks=lambda **hooks: {}, get_free_memory=lambda device: 2**33
    )

    def memory_required(self, *args, **kwargs) -> int:
        return 0

    def apply_model(self, x: torch.Tensor, timestep: torch.Tensor, c_concat: torch.Tensor, **kwargs) -> torch.Tensor:
        return c_concat


@pytest.mark.parametrize(
    "shape",
    [(9, 16, 16), (1, 16, 16), (16, 16), (2, 9, 16, 16), (2, 1, 16, 16), (9, 2, 4)],
    ids=["frames", "one frame", "one picture", "clips of frames", "clips of one frame", "frames in latent size"],
)
@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.LOOPED])
def test_masks_of_five_dimensional_latents_follow_the_frame(shape: tuple, schedule: WindowSchedule) -> None:
    """Two prompts, one of them masked, the mask in every form the host takes and made ready by the host."""
    x = torch.zeros(2, 4, 9, 2, 4)
    first, second = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)  # as the host's node for masks does
    prompts = [
        {"uuid": number, "model_conds": {"c_concat": comfy.conds.CONDRegular(value)}}
        for number, value in enumerate((first, second))
    ]
    prompts[0] |= {"mask": mask, "mask_strength": 0.7}
    comfy.samplers.resolve_areas_and_cond_masks_multidim(prompts, x.shape[2:], x.device)
    context = SlidingContext(WindowPlan(schedule, length=4, overlap=1))
    whole, parts = (
        comfy.samplers.calc_cond_batch(PassingModel(), [prompts], x, torch.tensor([2.0, 2.0]), model_options)[0]
        for model_options in ({}, {"context_handler": context})
    )
    torch.testing.assert_close(parts, whole)
    assert relative_error(whole, second) > 1e-2 and relative_error(whole, first) > 1e-2


@pytest.mark.parametrize("shape", [(48, 4, 2, 2), (1, 4, 48, 2, 2)])
@pytest.mark.parametrize("closed_loop", [False, True])
def test_overlap_linear_fades_over_the_seam_of_a_loop(shape: tuple, closed_loop: bool) -> None:
    """Windows twelve apart divide the clip evenly: where every window predicts the same, no frame is special."""
    x, axis = torch.zeros(shape), 0 if shape[0] == 48 else 2
    places = torch.arange(16.0).view([-1 if i == axis else 1 for i in range(x.ndim)])
    plan = WindowPlan(WindowSchedule.LOOPED, 16, 4, closed_loop=closed_loop)
    context = SlidingContext(plan, FuseMethod.OVERLAP_LINEAR)

    def calc(model, conds, x, timestep, model_options):
        return [x + places]

    out = context.execute(calc, None, [None], x, torch.ones(1), {})[0].movedim(axis, 0)
    torch.testing.assert_close(out, out.roll(12, 0))
    # Frame 0 is the first of one window and the thirteenth of the one over the seam.
    torch.testing.assert_close(out[0], torch.full_like(out[0], 0.2 * 0 + 0.8 * 12))


@pytest.mark.parametrize(("level", "step"), [(10.0, 0), (9.9999, 0), (7.0, 0), (5.0, 1), (3.0, 1), (1.0, 2), (0.5, 2)])
def test_levels_between_steps_belong_to_the_step_before(level: float, step: int) -> None:
    assert step_of(torch.tensor([level]), torch.tensor([10.0, 5.0, 1.0, 0.0])) == step


def test_memory_is_planned_for_one_window(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(
        comfy.sampler_helpers,
        "estimate_memory",
        lambda model, shape, conds, *rest: asked.append(shape[0]) or real(model, shape, conds, *rest),
    )
    tiny_host.sample(windowed(pair.video()), FRAMES, steps=1)
    assert asked == [LENGTH]


@pytest.mark.parametrize(("length", "overlap"), [(16, 16), (16, 20)])
def test_overlap_as_long_as_the_window_is_refused_on_the_node(length: int, overlap: int) -> None:
    assert "context_overlap" in options.known_windows(length, overlap, 1)
    assert options.known_windows(16, 0, 1) is True


@pytest.mark.parametrize("frames", [LENGTH, FRAMES])
def test_the_hosts_own_windows_are_replaced(frames: int, pair: Pair, run_node: Callable) -> None:
    """What its node leaves on a MODEL reads its own handler, and would fail on ours."""
    hosts = context_windows(pair.video(), run_node)
    assert torch.equal(tiny_host.sample(windowed(hosts), frames), tiny_host.sample(windowed(pair.video()), frames))


@pytest.mark.parametrize("whose", ["ours", "the host's"])
@pytest.mark.parametrize("kind", ["motion", "a second module", "ST-Attention"])
def test_windows_over_several_clips_are_refused(kind: str, whose: str, pair: Pair, run_node: Callable) -> None:
    cut = windowed if whose == "ours" else partial(context_windows, run_node=run_node)
    video = inflate(pair.plain, pair.module, frames=LENGTH + 1)
    if kind == "a second module":
        second = motion_module(5)
        video = inflate(inflate(pair.plain, pair.module), second, frames=LENGTH + 1)
    if kind == "ST-Attention":
        video = apply_frame_attention(pair.plain, FrameAttention(frames=LENGTH + 1))
    said = f"frames is {LENGTH + 1} on .* or Load Tuned Video Model, so that {2 * LENGTH + 2} frames are several clips"
    with pytest.raises(ClipError, match=said):
        tiny_host.sample(cut(video), 2 * LENGTH + 2)
    assert tiny_host.sample(cut(video), LENGTH + 1).isfinite().all(), "one clip of that length has windows"
