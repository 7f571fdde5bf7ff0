"""Prompt Travel on the host's samplers, against the same prompts as one conditioning with a text for every frame."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import comfy.conds
import comfy.hooks
import pytest
import tiny_host
import torch
from helpers_motion import Pair, relative_error
from latentmotion.host.context import ContextWindow, SlidingContext, apply_context
from latentmotion.host.travel import blend_call, encode_travel, read_travel
from latentmotion.sampling.travel import TravelError
from latentmotion.sampling.windows import WindowPlan, WindowSchedule

pytest_plugins = ["helpers_fixtures"]

FRAMES, CLIP, LENGTH = 3, 9, 4
LINES = "0: a\n2: b\n5: c"
# The same, mixed by hand: the share of each prompt in every frame.
MIXED = [{"a": 1.0}, {"a": 0.5, "b": 0.5}, {"b": 1.0}, {"b": 2 / 3, "c": 1 / 3}, {"b": 1 / 3, "c": 2 / 3},
         *[{"c": 1.0}] * 4]  # fmt: skip


class StandInClip:
    """What a node asks of a CLIP: random embeddings that follow from the text, with 77 tokens, or 154 for "long"."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoded: list[str] = []

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        self.encoded.append(tokens)
        length = 77 * (1 + ("long" in tokens))
        return tiny_host.conditioning(self.model, sum(map(ord, tokens)), tokens=length)


@pytest.fixture
def clip(pair: Pair) -> StandInClip:
    return StandInClip(pair.plain)


def travel(clip: StandInClip, lines: str = LINES, interpolation: str = "linear") -> list:
    return encode_travel(clip, read_travel(lines, interpolation))


def per_frame(clip: StandInClip, mixtures: list[dict[str, float]]) -> list:
    """One conditioning with a row per frame."""
    rows, pooled = [], []
    for mixture in mixtures:
        parts = [(clip.encode_from_tokens_scheduled(text)[0], share) for text, share in mixture.items()]
        rows.append(sum(share * text for (text, _), share in parts))
        pooled.append(sum(share * extra["pooled_output"] for (_, extra), share in parts))
    return [[torch.cat(rows), {"pooled_output": torch.cat(pooled)}]]


def arriving(conds: list[list | None], x: torch.Tensor, window: ContextWindow | None = None) -> list:
    """What the host goes on with in a call on latents x, from CONDITIONING as nodes hand it over."""
    model = SimpleNamespace(current_patcher=SimpleNamespace(get_attachment=lambda key: None))
    given = [cond and [_entry(*item) for item in cond] for cond in conds]
    options = {"transformer_options": {} if window is None else {"context_window": window}}
    return blend_call(lambda model, conds, *rest: conds, model, given, x, torch.ones(1), options)


def _entry(text: torch.Tensor, extra: dict) -> dict:
    model_conds = extra.get("model_conds", {}) | {"c_crossattn": comfy.conds.CONDCrossAttn(text)}
    return {**extra, "model_conds": model_conds}


def test_one_prompt_is_what_clip_text_encode_makes(clip: StandInClip, run_node: Callable, pair: Pair) -> None:
    text = "a red circle moves right"
    (plain,) = run_node("CLIPTextEncode", clip=clip, text=text)
    found, table = run_node(
        "LatentMotionPromptTravel", clip=clip, prompts=f"4: {text}\n9: {text}", interpolation="eased"
    )
    assert len(found) == 1 and torch.equal(found[0][0], plain[0][0]) and found[0][1].keys() == plain[0][1].keys()
    assert text in table
    assert torch.equal(*(tiny_host.sample(pair.video(), FRAMES, steps=1, positive=p) for p in (plain, found)))


@pytest.mark.parametrize("interpolation", ["linear", "eased", "hold"])
def test_frames_before_the_change_see_the_plain_prompt(interpolation: str, clip: StandInClip, pair: Pair) -> None:
    plain, found = clip.encode_from_tokens_scheduled("a"), travel(clip, "0: a\n2: a\n3: long b", interpolation)
    assert torch.equal(*(tiny_host.sample(pair.video(), FRAMES, positive=p) for p in (plain, found)))


def test_held_prompts_are_those_of_each_frame(clip: StandInClip, pair: Pair) -> None:
    expected = per_frame(clip, [{"a": 1.0}, {"a": 1.0}, {"b": 1.0}])
    assert torch.equal(
        *(tiny_host.sample(pair.video(), FRAMES, positive=p) for p in (expected, travel(clip, LINES, "hold")))
    )


def test_pooled_text_travels_too() -> None:
    model = tiny_host.sdxl()
    clip = StandInClip(model)
    expected, found, first = (
        tiny_host.sample(model, FRAMES, steps=1, positive=positive)
        for positive in (per_frame(clip, MIXED[:FRAMES]), travel(clip), clip.encode_from_tokens_scheduled("a"))
    )
    assert relative_error(found, expected) < 1e-5 < relative_error(first, expected)


@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.LOOPED])
def test_sliding_windows_see_their_frames(schedule: WindowSchedule, clip: StandInClip, pair: Pair) -> None:
    """Frames kept apart must be drawn as without windows."""
    windowed = apply_context(pair.plain, SlidingContext(WindowPlan(schedule, LENGTH, 2)))
    expected = tiny_host.sample(pair.plain, CLIP, positive=per_frame(clip, MIXED))
    for model in (pair.plain, windowed):
        assert relative_error(tiny_host.sample(model, CLIP, positive=travel(clip)), expected) < 1e-4


def test_windows_of_the_host_see_their_frames(
    clip: StandInClip, pair: Pair, run_node: Callable, core_nodes: dict[str, type]
) -> None:
    asked = signature(core_nodes["ContextWindowsManual"].execute).parameters
    (windowed,) = run_node(
        "ContextWindowsManual",
        model=pair.still,  # which moves nothing, and lets windows of the host over a batch run at all
        context_length=LENGTH,
        context_overlap=2,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        dim=0,
        **({"freenoise": False} if "freenoise" in asked else {}),
    )
    expected = tiny_host.sample(pair.plain, CLIP, positive=per_frame(clip, MIXED))
    assert relative_error(tiny_host.sample(windowed, CLIP, positive=travel(clip)), expected) < 1e-4


def test_every_clip_of_a_batch_travels(clip: StandInClip, pair: Pair) -> None:
    model = pair.video(frames=FRAMES)
    expected = tiny_host.sample(model, 2 * FRAMES, positive=per_frame(clip, [*MIXED[:FRAMES], *MIXED[:FRAMES]]))
    assert relative_error(tiny_host.sample(model, 2 * FRAMES, positive=travel(clip)), expected) < 1e-5


def test_prompts_of_different_length_are_mixed_as_the_host_pads_them(clip: StandInClip, pair: Pair) -> None:
    (short, _), (long, _) = (clip.encode_from_tokens_scheduled(text)[0] for text in ("a", "long b"))
    short = short.repeat(1, 2, 1)
    expected = torch.cat([short, 0.5 * short + 0.5 * long, long])
    drawn = [
        tiny_host.sample(pair.plain, FRAMES, positive=positive)
        for positive in ([[expected, {}]], travel(clip, "0: a\n2: long b"))
    ]
    assert relative_error(*drawn) < 1e-5


def test_prompts_that_cannot_be_repeated_are_filled_up(clip: StandInClip) -> None:
    clip.encode_from_tokens_scheduled = lambda text: [[torch.ones(1, 7 if text == "a" else 10, 4), {}]]
    ((entry,),) = arriving([travel(clip, "0: a\n1: b")], tiny_host.latent(2))
    rows = entry["model_conds"]["c_crossattn"].cond
    assert rows.shape == (2, 10, 4) and rows[0].sum() == 7 * 4 and rows[1].sum() == 10 * 4


def test_negative_shares_the_batch(clip: StandInClip, pair: Pair) -> None:
    calls = []
    model = pair.plain.clone()

    def listen(executor, x, t, *args, **kwargs):
        calls.append(len(args[3]["cond_or_uncond"]))
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key("apply_model", "listener", listen)
    tiny_host.sample(model, FRAMES, steps=2, positive=travel(clip))
    assert calls == [2, 2], "positive and negative in one call, and no call per prompt"
    assert not [key for wrappers in pair.plain.wrappers.values() for key in wrappers if "travel" in key]


def test_conditioning_does_not_grow_with_the_clip(clip: StandInClip) -> None:
    sizes = []
    for frames in (50, 5000):
        clip.encoded.clear()
        found = travel(clip, f"0: a\n{frames // 2}: b\n{frames // 2 + 1}: a\n{frames - 1}: c")
        tensors = [t for text, extra in found for t in (text, *extra.values()) if isinstance(t, torch.Tensor)]
        sizes.append((len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)))
        assert clip.encoded == ["a", "b", "c"]
        ((entry,),) = arriving([found], tiny_host.latent(4), ContextWindow([24, 25, 26, 27], 0, frames))
        assert entry["model_conds"]["c_crossattn"].cond.shape[0] <= 4
    assert sizes[0] == sizes[1]


def test_areas_and_other_prompts_stay_beside_it(clip: StandInClip, pair: Pair, run_node: Callable) -> None:
    def half(conditioning: list, x: int) -> list:
        area = {"width": 32, "height": 64, "x": x, "y": 0, "strength": 0.7}
        return run_node("ConditioningSetArea", conditioning=conditioning, **area)[0]

    other = clip.encode_from_tokens_scheduled("d")
    drawn = [
        tiny_host.sample(pair.plain, FRAMES, positive=half(prompts, 0) + other + half(prompts, 32))
        for prompts in (per_frame(clip, MIXED[:FRAMES]), travel(clip))
    ]
    assert relative_error(*drawn) < 1e-5


@pytest.mark.parametrize("bounds", [False, True])
def test_an_area_of_the_opposite_prompt_gets_the_whole_travel(
    bounds: bool, clip: StandInClip, pair: Pair, run_node: Callable
) -> None:
    """The host copies one prompt into an area that has none of its own."""
    negative = clip.encode_from_tokens_scheduled("d")
    if bounds:
        mask = torch.zeros(1, 64, 64)
        mask[:, :32] = 1.0
        settings = {"mask": mask, "strength": 1.0, "set_cond_area": "mask bounds"}
        (negative,) = run_node("ConditioningSetMask", conditioning=negative, **settings)
    else:
        area = {"width": 32, "height": 64, "x": 0, "y": 0, "strength": 1.0}
        (negative,) = run_node("ConditioningSetArea", conditioning=negative, **area)
    prompts = per_frame(clip, MIXED[:FRAMES]), travel(clip)
    for one_way in ([{"positive": p, "negative": negative} for p in prompts],
                    [{"positive": negative, "negative": p} for p in prompts]):  # fmt: skip
        drawn = [tiny_host.sample(pair.plain, FRAMES, **both) for both in one_way]
        assert relative_error(*drawn) < 1e-5


def test_hooks_of_the_user_stay_and_are_shared_with_the_negative(clip: StandInClip) -> None:
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.WeightHook())
    plain = tiny_host.conditioning(clip.model)
    both = [comfy.hooks.set_hooks_for_conditioning(prompts, group) for prompts in (travel(clip), plain)]
    (positive,), (negative,) = arriving(both, tiny_host.latent(FRAMES))
    assert positive["hooks"] is negative["hooks"] is group
    ((positive,),) = arriving(both[:1], tiny_host.latent(FRAMES))
    assert set(group.hooks) < set(positive["hooks"].hooks)


def test_video_latents_get_the_mean_of_their_frames(clip: StandInClip) -> None:
    x = torch.zeros(1, 4, FRAMES, 2, 2)
    (positive,), negative = arriving([travel(clip), None], x)
    rows = [per_frame(clip, [mixture])[0][0] for mixture in MIXED[:FRAMES]]
    torch.testing.assert_close(positive["model_conds"]["c_crossattn"].cond, sum(rows) / FRAMES)
    assert negative is None
    ((later,),) = arriving([travel(clip)], x, ContextWindow([5, 6, 7], 2, CLIP))
    assert torch.equal(later["model_conds"]["c_crossattn"].cond, per_frame(clip, [{"c": 1.0}])[0][0])


def test_a_prompt_that_got_lost_is_noticed(clip: StandInClip) -> None:
    with pytest.raises(TravelError, match="Only 2 of the 3 prompts.*split_conds_to_windows"):
        arriving([travel(clip)[:2]], tiny_host.latent(FRAMES))


def test_prompts_of_different_width_are_refused(clip: StandInClip) -> None:
    clip.encode_from_tokens_scheduled = lambda text: [[torch.ones(1, 7, 4 + len(text)), {}]]
    with pytest.raises(TravelError, match="different shapes"):
        arriving([travel(clip, "0: a\n1: bb")], tiny_host.latent(2))


def test_faults_are_told_before_anything_runs(pack_nodes: dict[str, type]) -> None:
    check = pack_nodes["LatentMotionPromptTravel"].validate_inputs
    assert check(prompts=LINES) is True and check() is True
    assert check(prompts="0: a\nthen b").startswith("Line 2")
    with pytest.raises(TravelError, match="no text encoder"):
        travel(None)
