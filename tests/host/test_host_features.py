"""Features of the host keep their meaning on a MODEL with a motion module.

Each is tried three ways: with a module that adds exactly zero the clip is the image model's, bit for bit, so every
layer, patch and residual still is where the host thinks it is; with a real module the clip is another one; and the
feature changes that clip.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.context_windows
import comfy.controlnet
import comfy.hooks
import comfy.sd
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, inflate, motion_lora, motion_module, relative_error
from latentmotion.motion_modules.animatediff.spec import V1, V2, Variant
from latentmotion.sampling.frame_values import frame_values
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

FRAMES = 3
STEPS = 2
Feature = Callable[[ModelPatcher, Callable], tuple[ModelPatcher, dict[str, Any]]]


def _random(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _of_node(node_id: str, size: int = 8, steps: int = STEPS, **widgets: Any) -> Feature:
    """A feature that is one node from MODEL to MODEL, on latents large enough for it (the deepest level has 1/8)."""

    def apply(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
        return run_node(node_id, model=model, **widgets)[0], {"size": size, "steps": steps}

    return apply


def _of_sampling(**options: Callable[[], Any]) -> Feature:
    """A feature that is an argument of the sampler."""
    return lambda model, run_node: (model, {name: make() for name, make in options.items()})


def _controlnet(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
    """A hint of its own for every frame, for both conditionings."""
    hints = _random(FRAMES, 64, 64, 3)
    positive, negative = run_node(
        "ControlNetApplyAdvanced", positive=tiny_host.conditioning(model, 1), negative=tiny_host.conditioning(model, 2),
        control_net=tiny_host.controlnet(), image=hints, strength=0.8, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    return model, {"positive": positive, "negative": negative}


def image_lora(model: ModelPatcher) -> dict[str, Tensor]:
    """A LoRA on every layer of the blocks whose layers would shift, were a module put among them by number."""
    generator = torch.Generator().manual_seed(4)
    blocks = tuple(f"diffusion_model.{name}." for name in ("output_blocks.2", "output_blocks.5", "output_blocks.8",
                                                          "middle_block", "input_blocks.1"))  # fmt: skip
    lora = {}
    for key, weight in model.model.state_dict().items():
        if key.startswith(blocks) and key.endswith(".weight") and weight.ndim > 1:
            stem = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            lora[f"{stem}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.2
            lora[f"{stem}.lora_down.weight"] = torch.randn(2, weight[0].numel(), generator=generator) * 0.2
    return lora


def _image_lora(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
    lora = image_lora(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(patched.patches) == len(lora) // 2, "the host did not find every layer of the LoRA"
    return patched, {}


def _lora_hook(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
    """A LoRA on the positive conditioning only, and only in the first part of the run."""
    hooks = comfy.hooks.create_hook_lora(image_lora(model), 1.0, 0.0)
    schedule = comfy.hooks.HookKeyframeGroup()
    schedule.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    schedule.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(schedule)
    return model, {"positive": comfy.hooks.set_hooks_for_conditioning(tiny_host.conditioning(model, 1), hooks)}


def _area_and_range(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
    """One conditioning on the whole picture, one in a corner for part of the run: three chunks, not of one size."""
    (corner,) = run_node("ConditioningSetArea", conditioning=tiny_host.conditioning(model, 3), width=32, height=32,
                         x=0, y=0, strength=1.0)  # fmt: skip
    (corner,) = run_node("ConditioningSetTimestepRange", conditioning=corner, start=0.0, end=0.7)
    return model, {"positive": tiny_host.conditioning(model, 1) + corner}


def _prompt_per_frame(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
    """As prompt travel packs do: a conditioning with a text for every frame."""
    return model, {"positive": tiny_host.conditioning(model, 1, batch=FRAMES)}


def _masked() -> Tensor:
    return (_random(FRAMES, 1, 64, 64, seed=2) > 0.5).float()


FEATURES: dict[str, Feature] = {
    "controlnet": _controlnet,
    "image LoRA": _image_lora,
    "LoRA hook": _lora_hook,
    "area and range": _area_and_range,
    "prompt per frame": _prompt_per_frame,
    "FreeU": _of_node("FreeU", b1=1.1, b2=1.2, s1=0.9, s2=0.2),
    "FreeU_V2": _of_node("FreeU_V2", size=16, b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "PAG": _of_node("PerturbedAttentionGuidance", scale=3.0),
    "RescaleCFG": _of_node("RescaleCFG", multiplier=0.7),
    "v-prediction": _of_node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True),
    "deep shrink": _of_node("PatchModelAddDownscale", block_number=3, downscale_factor=2.0, start_percent=0.0,
                            end_percent=0.6, downscale_after_skip=True, downscale_method="bicubic",
                            upscale_method="bicubic"),
    "EasyCache": _of_node("EasyCache", steps=4, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False),
    "inpainting": _of_sampling(noise_mask=_masked, start=lambda: _random(FRAMES, 4, 8, 8)),
    "img2img": _of_sampling(denoise=lambda: 0.5, start=lambda: _random(FRAMES, 4, 8, 8)),
}  # fmt: skip


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
    _clip(_image_lora, pair.video(), run_node)
    assert torch.equal(tiny_host.sample(pair.video(), FRAMES), first)


def test_every_frame_follows_its_own_hint(pair: Pair, run_node: Callable) -> None:
    """Without motion in between, another hint for the last frame changes that frame and no other."""
    positive = []
    for last in (1, 2):
        hints = torch.cat([_random(FRAMES - 1, 64, 64, 3), _random(1, 64, 64, 3, seed=last)])
        positive += run_node("ControlNetApply", conditioning=tiny_host.conditioning(pair.plain, 1), image=hints,
                             control_net=tiny_host.controlnet(), strength=1.0)  # fmt: skip
    still, video = ([tiny_host.sample(model, FRAMES, positive=cond) for cond in positive]
                    for model in (pair.still, pair.video()))  # fmt: skip
    assert torch.equal(still[0][:-1], still[1][:-1]) and not torch.equal(still[0][-1], still[1][-1])
    assert not torch.equal(video[0][0], video[1][0]), "motion couples the frames"


def test_scheduled_lora_hook_acts_only_in_its_part(pair: Pair, run_node: Callable) -> None:
    """A hook whose keyframes are all zero is no hook; the real one is neither that nor the LoRA throughout."""
    model, options = _lora_hook(pair.video(), run_node)
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
    start, mask = _random(FRAMES, 4, 8, 8), torch.ones(FRAMES, 1, 8, 8)
    mask[:, :, :, :4] = 0.0
    clip = tiny_host.sample(pair.video(), FRAMES, start=start, noise_mask=mask)
    assert torch.allclose(clip[..., :4], start[..., :4], atol=1e-5)
    assert not torch.allclose(clip[..., 4:], start[..., 4:], atol=1e-2)


def _windowed(model: ModelPatcher, run_node: Callable, **changes: Any) -> ModelPatcher:
    """The host's Context Windows (Manual) over the batch of frames."""
    widgets = {"context_length": 4, "context_overlap": 2, "context_schedule": "standard_static", "dim": 0,
               "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}  # fmt: skip
    widgets |= changes
    if "freenoise" not in inspect.signature(comfy.context_windows.IndexListContextHandler).parameters:
        del widgets["freenoise"]
    return run_node("ContextWindowsManual", model=model, **widgets)[0]


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
    model = _windowed(pair.video(), run_node, context_length=length, context_schedule=schedule)
    model.add_wrapper_with_key("apply_model", "note", _record(seen))
    clip = tiny_host.sample(model, frames)
    assert clip.shape[0] == frames and torch.isfinite(clip).all()
    for images, conditionings, params in seen:
        assert params["full_length"] == frames
        assert len(params["sub_idxs"]) == params["context_length"] == images // conditionings <= length + 1
    assert {frame for _, _, params in seen for frame in params["sub_idxs"]} == set(range(frames))


def test_windows_without_motion_are_the_images(pair: Pair, run_node: Callable) -> None:
    plain = tiny_host.sample(pair.plain, 10)
    still, video = (tiny_host.sample(_windowed(model, run_node), 10) for model in (pair.still, pair.video()))
    assert relative_error(still, plain) < 1e-5 < relative_error(video, plain)


def test_strength_per_frame_follows_the_window(pair: Pair, run_node: Callable) -> None:
    """Motion on the last 6 of 10 frames only: windows before them are the image model's, those within are not."""
    model = pair.video(strength=frame_values(1.0, [0.0] * 4 + [1.0] * 6))
    plain = tiny_host.sample(pair.plain, 10, steps=1)
    video = tiny_host.sample(_windowed(model, run_node, context_overlap=0, fuse_method="flat"), 10, steps=1)
    assert relative_error(video[:4], plain[:4]) < 1e-5
    assert relative_error(video[8:], plain[8:]) > 1e-3


def test_clip_longer_than_the_positions_goes_through_windows(pair: Pair, run_node: Callable) -> None:
    """Whatever frames the host adds to a window of its own accord, the length the user set is what counts."""
    model = pair.video(motion_module(seed=3, positions=4))
    with pytest.raises(ValueError, match="4 frame positions"):
        tiny_host.sample(model, 10)
    assert torch.isfinite(tiny_host.sample(_windowed(model, run_node), 10)).all()


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
    tiny_host.sample(_windowed(pair.video(), run_node), 10, positive=positive)
    assert all(params["full_length"] == 10 for _, params in windows)
    assert all(frames == params["context_length"] == len(params["sub_idxs"]) for frames, params in windows)


@pytest.mark.parametrize("weights", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [V2, V1], ids=["v2", "v1"])
def test_low_precision_weights_of_both_models(weights: torch.dtype, variant: Variant) -> None:
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
        clips.append(tiny_host.sample(inflate(image, module), FRAMES))
    assert relative_error(clips[0], clips[1]) < 1e-5


def test_bfloat16_computation_is_close(pair: Pair) -> None:
    image = tiny_host.sd15(dtype=torch.bfloat16)
    clip = tiny_host.sample(inflate(image, motion_module(dtype=torch.bfloat16)), FRAMES, steps=1)
    assert relative_error(clip, tiny_host.sample(pair.video(), FRAMES, steps=1)) < 0.1


class Cramped(ModelPatcher):
    """A patcher that is given 64 KB, as `--lowvram` gives what a small card has left: most layers stay behind."""

    def load(self, device_to: Any = None, lowvram_model_memory: float = 0, *args: Any, **kw: Any) -> None:
        super().load(device_to, lowvram_model_memory=64 * 1024, force_patch_weights=False, full_load=False)


class Shrinking(ModelPatcher):
    """A patcher that is told to give back half of its memory as soon as it is loaded."""

    def load(self, *args: Any, **kw: Any) -> None:
        super().load(*args, **kw)
        self.partially_unload(self.offload_device, self.model_size() // 2)


@pytest.mark.parametrize("variant", [V2, V1], ids=["v2", "v1"])
@pytest.mark.parametrize("kind", [Cramped, Shrinking])
def test_partly_loaded_models_with_patches_on_both(kind: type[ModelPatcher], variant: Variant) -> None:
    """UNet with an image LoRA and motion module with a MotionLoRA, both patched layer by layer as they are used."""
    clips, partly = [], []
    for patcher_class in (ModelPatcher, kind):
        image, module = tiny_host.sd15(), motion_lora(motion_module(variant=variant))
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
