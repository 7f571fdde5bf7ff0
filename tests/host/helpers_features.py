"""Features of the host that a MODEL with motion is used with, and ways the host loads it: what tests draw from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.context_windows
import comfy.hooks
import comfy.sd
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

FRAMES = 3
STEPS = 2
Feature = Callable[[ModelPatcher, Callable], tuple[ModelPatcher, dict[str, Any]]]


def random(*shape: int, seed: int = 9) -> Tensor:
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
    hints = random(FRAMES, 64, 64, 3)
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


def with_image_lora(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
    lora = image_lora(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(patched.patches) == len(lora) // 2, "the host did not find every layer of the LoRA"
    return patched, {}


def with_lora_hook(model: ModelPatcher, run_node: Callable) -> tuple[ModelPatcher, dict[str, Any]]:
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
    return (random(FRAMES, 1, 64, 64, seed=2) > 0.5).float()


FEATURES: dict[str, Feature] = {
    "controlnet": _controlnet,
    "image LoRA": with_image_lora,
    "LoRA hook": with_lora_hook,
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
    "inpainting": _of_sampling(noise_mask=_masked, start=lambda: random(FRAMES, 4, 8, 8)),
    "img2img": _of_sampling(denoise=lambda: 0.5, start=lambda: random(FRAMES, 4, 8, 8)),
}  # fmt: skip


def windowed(model: ModelPatcher, run_node: Callable, **changes: Any) -> ModelPatcher:
    """The host's Context Windows (Manual) over the batch of frames."""
    widgets = {"context_length": 4, "context_overlap": 2, "context_schedule": "standard_static", "dim": 0,
               "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}  # fmt: skip
    widgets |= changes
    if "freenoise" not in inspect.signature(comfy.context_windows.IndexListContextHandler).parameters:
        del widgets["freenoise"]
    return run_node("ContextWindowsManual", model=model, **widgets)[0]


class Cramped(ModelPatcher):
    """A patcher that is given 64 KB, as `--lowvram` gives what a small card has left: most layers stay behind."""

    def load(self, device_to: Any = None, lowvram_model_memory: float = 0, *args: Any, **kw: Any) -> None:
        super().load(device_to, lowvram_model_memory=64 * 1024, force_patch_weights=False, full_load=False)


class Shrinking(ModelPatcher):
    """A patcher that is told to give back half of its memory as soon as it is loaded."""

    def load(self, *args: Any, **kw: Any) -> None:
        super().load(*args, **kw)
        self.partially_unload(self.offload_device, self.model_size() // 2)
