"""Features of the host keep their meaning on a MODEL with a motion module.

Each is tried three ways: with a module that adds exactly zero the clip is the image model's, bit for bit, so every
layer, patch and residual still is where the host thinks it is; with a real module the clip is another one; and the
feature changes that clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.sd
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_features import (
    FEATURES,
    FRAMES,
    STEPS,
    Cramped,
    Feature,
    Shrinking,
    image_lora,
    random,
    windowed,
    with_image_lora,
    with_lora_hook,
)
from helpers_motion import Pair, inflate, motion_lora, motion_module, relative_error
from helpers_restored import Watch
from latentmotion.motion_modules.animatediff.spec import V1, V2, Variant
from latentmotion.sampling.frame_values import frame_values
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]


def _clip(feature: Feature, model: ModelPatcher, run_node: Callable) -> Tensor:
    model, options = feature(model, run_node)
    return tiny_host.sample(model, FRAMES, **{"steps": STEPS} | options)


@pytest.mark.parametrize("name", FEATURES)
def test_feature_means_what_it_means_on_images(name: str, pair: Pair, run_node: Callable) -> None:
    feature = FEATURES[name]
    images, still, video = (_clip(feature, model, run_node) for model in (pair.plain, pair.still, pair.video()))
    assert torch.isfinite(video).all()
    assert torch.equal(still, images), f"{relative_error(still, images)} off"
    assert not torch.equal(video, images), "the motion module had no effect"
    _, options = feature(pair.plain, run_node)
    size, steps = options.get("size", 8), options.get("steps", STEPS)
    without = tiny_host.sample(pair.video(), FRAMES, steps=steps, size=size)
    assert not torch.equal(video, without), "the feature had no effect"


@pytest.mark.parametrize("name", ["image LoRA", "FreeU", "PAG", "deep shrink"])
def test_order_of_nodes_does_not_matter(name: str, pair: Pair, run_node: Callable) -> None:
    """The feature put on before Apply Motion Module, or after it."""
    after = _clip(FEATURES[name], pair.video(), run_node)
    before = pair.video(base=FEATURES[name](pair.plain, run_node)[0])
    assert torch.equal(after, tiny_host.sample(before, FRAMES, steps=STEPS))


def test_removing_an_image_lora_restores_the_weights(pair: Pair, run_node: Callable) -> None:
    first = tiny_host.sample(pair.video(), FRAMES)
    _clip(with_image_lora, pair.video(), run_node)
    assert torch.equal(tiny_host.sample(pair.video(), FRAMES), first)


def test_every_frame_follows_its_own_hint(pair: Pair, run_node: Callable) -> None:
    """Without motion in between, another hint for the last frame changes that frame and no other."""
    positive = []
    for last in (1, 2):
        hints = torch.cat([random(FRAMES - 1, 64, 64, 3), random(1, 64, 64, 3, seed=last)])
        positive += run_node("ControlNetApply", conditioning=tiny_host.conditioning(pair.plain, 1), image=hints,
                             control_net=tiny_host.controlnet(), strength=1.0)  # fmt: skip
    still, video = ([tiny_host.sample(model, FRAMES, positive=cond) for cond in positive]
                    for model in (pair.still, pair.video()))  # fmt: skip
    assert torch.equal(still[0][:-1], still[1][:-1]) and not torch.equal(still[0][-1], still[1][-1])
    assert not torch.equal(video[0][0], video[1][0]), "motion couples the frames"


def test_scheduled_lora_hook_acts_only_in_its_part(pair: Pair, run_node: Callable) -> None:
    """A hook whose keyframes are all zero is no hook; the real one is neither that nor the LoRA throughout."""
    model, options = with_lora_hook(pair.video(), run_node)
    scheduled = tiny_host.sample(model, FRAMES, steps=STEPS, **options)
    off = comfy.hooks.create_hook_lora(image_lora(model), 0.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(tiny_host.conditioning(model, 1), off)
    never = tiny_host.sample(model, FRAMES, steps=STEPS, positive=positive)
    full = comfy.hooks.create_hook_lora(image_lora(model), 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(tiny_host.conditioning(model, 1), full)
    always = tiny_host.sample(model, FRAMES, steps=STEPS, positive=positive)
    bare = tiny_host.sample(model, FRAMES, steps=STEPS)
    assert relative_error(never, bare) < 1e-5
    assert relative_error(scheduled, bare) > 1e-3 and relative_error(scheduled, always) > 1e-3


def test_masked_part_keeps_the_given_picture(pair: Pair) -> None:
    start, mask = random(FRAMES, 4, 8, 8), torch.ones(FRAMES, 1, 8, 8)
    mask[:, :, :, :4] = 0.0
    clip = tiny_host.sample(pair.video(), FRAMES, start=start, noise_mask=mask)
    assert torch.allclose(clip[..., :4], start[..., :4], atol=1e-5)
    assert not torch.allclose(clip[..., 4:], start[..., 4:], atol=1e-2)


def _record(seen: list) -> Callable:
    """A wrapper that notes (images in the call, conditionings in it, what neighbouring packs can read)."""

    def note(executor: Callable, x: Tensor, t: Tensor, *args: Any, **kw: Any) -> Tensor:
        options = args[3] if len(args) > 3 else kw["transformer_options"]
        seen.append((x.shape[0], len(options["cond_or_uncond"]), options["ad_params"]))
        return executor(x, t, *args, **kw)

    return note


@pytest.mark.parametrize(
    ("schedule", "frames", "length"),
    [("standard_static", 24, 8), ("standard_uniform", 10, 4), ("looped_uniform", 10, 4), ("batched", 10, 4)],
)
def test_context_windows_of_the_host(schedule: str, frames: int, length: int, pair: Pair, run_node: Callable) -> None:
    """Each call of the network is one window of the clip, and its frames are published."""
    seen: list = []
    model = windowed(pair.video(), run_node, context_length=length, context_schedule=schedule)
    model.add_wrapper_with_key("apply_model", "note", _record(seen))
    clip = tiny_host.sample(model, frames)
    assert clip.shape[0] == frames and torch.isfinite(clip).all()
    for images, conditionings, params in seen:
        assert params["full_length"] == frames
        assert len(params["sub_idxs"]) == params["context_length"] == images // conditionings <= length + 1
    assert {frame for _, _, params in seen for frame in params["sub_idxs"]} == set(range(frames))


def test_windows_without_motion_are_the_images(pair: Pair, run_node: Callable) -> None:
    plain = tiny_host.sample(pair.plain, 10)
    still, video = (tiny_host.sample(windowed(model, run_node), 10) for model in (pair.still, pair.video()))
    assert relative_error(still, plain) < 1e-5 < relative_error(video, plain)


def test_strength_per_frame_follows_the_window(pair: Pair, run_node: Callable) -> None:
    """Motion on the last 6 of 10 frames only: windows before them are the image model's, those within are not."""
    model = pair.video(strength=frame_values(1.0, [0.0] * 4 + [1.0] * 6))
    plain = tiny_host.sample(pair.plain, 10, steps=1)
    video = tiny_host.sample(windowed(model, run_node, context_overlap=0, fuse_method="flat"), 10, steps=1)
    assert relative_error(video[:4], plain[:4]) < 1e-5
    assert relative_error(video[8:], plain[8:]) > 1e-3


def test_clip_longer_than_the_positions_goes_through_windows(pair: Pair, run_node: Callable, watched: Watch) -> None:
    """Whatever frames the host adds to a window of its own accord, the length the user set is what counts."""
    model = pair.video(watched(motion_module(seed=3, positions=4)))
    with pytest.raises(ValueError, match="4 frame positions"):
        tiny_host.sample(model, 10)
    assert torch.isfinite(tiny_host.sample(windowed(model, run_node), 10)).all()


class _FrameReader(comfy.controlnet.ControlBase):
    """Stands where Advanced-ControlNet stands: reads, per call, which frames it is asked about."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def get_control(self, x: Tensor, t: Tensor, cond: dict, batched_number: int, transformer_options: dict) -> None:
        self.seen.append((x.shape[0] // batched_number, transformer_options["ad_params"]))

    def copy(self) -> _FrameReader:
        copied = _FrameReader(self.seen)
        self.copy_to(copied)
        return copied


def test_neighbours_read_which_frames_are_sampled(pair: Pair, run_node: Callable) -> None:
    positive = tiny_host.conditioning(pair.plain, 1)
    whole: list = []
    positive[0][1]["control"] = _FrameReader(whole)
    tiny_host.sample(pair.video(), FRAMES, positive=positive)
    assert {frames for frames, _ in whole} == {FRAMES}
    assert all(params == {"full_length": FRAMES, "context_length": None, "sub_idxs": None} for _, params in whole)
    windows: list = []
    positive[0][1]["control"] = _FrameReader(windows)
    tiny_host.sample(windowed(pair.video(), run_node), 10, positive=positive)
    assert all(params["full_length"] == 10 for _, params in windows)
    assert all(frames == params["context_length"] == len(params["sub_idxs"]) for frames, params in windows)


@pytest.mark.parametrize("weights", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [V2, V1], ids=["v2", "v1"])
def test_low_precision_weights_of_both_models(weights: torch.dtype, variant: Variant, watched: Watch) -> None:
    """Weights stored small and computed in float32 give the clip of the same weights stored large."""
    clips = []
    for stored in (weights, torch.float32):
        image = tiny_host.sd15(dtype=weights, compute_dtype=torch.float32)
        module = motion_module(dtype=weights, variant=variant)
        if stored is torch.float32:
            exact = tiny_host.sd15()
            exact.model.load_state_dict({k: v.float() for k, v in image.model.state_dict().items()})
            image, module = exact, motion_module(dtype=weights, variant=variant)
            module.patcher.model.float()
        clips.append(tiny_host.sample(inflate(watched(image), watched(module)), FRAMES))
    assert relative_error(clips[0], clips[1]) < 1e-5


def test_bfloat16_computation_is_close(pair: Pair, watched: Watch) -> None:
    image, module = tiny_host.sd15(dtype=torch.bfloat16), motion_module(dtype=torch.bfloat16)
    clip = tiny_host.sample(inflate(watched(image), watched(module)), FRAMES, steps=1)
    assert relative_error(clip, tiny_host.sample(pair.video(), FRAMES, steps=1)) < 0.1


@pytest.mark.parametrize("variant", [V2, V1], ids=["v2", "v1"])
@pytest.mark.parametrize("kind", [Cramped, Shrinking])
def test_partly_loaded_models_with_patches_on_both(kind: type[ModelPatcher], variant: Variant,
                                                     watched: Watch) -> None:  # fmt: skip
    """UNet with an image LoRA and motion module with a MotionLoRA, both patched layer by layer as they are used."""
    clips, partly = [], []
    for patcher_class in (ModelPatcher, kind):
        image, module = watched(tiny_host.sd15()), motion_lora(watched(motion_module(variant=variant)))
        for patcher in (image, module.patcher):
            patcher.__class__ = patcher_class
        image, _ = comfy.sd.load_lora_for_models(image, None, _norm_patches(), 1.0, 0.0)
        clips.append(tiny_host.sample(inflate(image, module), FRAMES))
        partly.append((image.model.model_lowvram, module.patcher.model.model_lowvram))
    assert partly == [(False, False), (True, True)], "the second pair must really be loaded in part"
    assert relative_error(clips[1], clips[0]) < 1e-5


def _norm_patches() -> dict[str, Tensor]:
    """The LoRA above, and changes of the norms that a v1 module computes over all frames."""
    model = tiny_host.sd15()
    generator = torch.Generator().manual_seed(6)
    found = image_lora(model)
    for key, value in model.model.state_dict().items():
        if ".in_layers.0." in key or ".out_layers.0." in key or key.startswith("diffusion_model.out.0."):
            stem = key.rsplit(".", 1)
            found[f"{stem[0]}.{'diff' if stem[1] == 'weight' else 'diff_b'}"] = torch.randn(
                value.shape, generator=generator) * 0.3  # fmt: skip
    return found
