"""Small random motion modules for the host tests, and pairs of one with an image model that tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_restored import Rest, assert_restored
from latentmotion.host.inflate import MotionSettings, apply_motion
from latentmotion.host.motion import MotionModule, manage, patch_motion_lora
from latentmotion.motion_modules.animatediff.checkpoint import MotionFile
from latentmotion.motion_modules.animatediff.lora import read_motion_lora
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.spec import V2, MotionSpec, Variant
from torch import Tensor

WIDTHS = (32, 64, 128, 128)
SMALL = {
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
}
SMALL_WIDTHS = (32, 64)


def motion_spec(
    widths: tuple[int, ...] = WIDTHS, layers: int = 2, variant: Variant = V2, positions: int = 32
) -> MotionSpec:
    """Layout of a module with a mid block for a UNet of these widths and residual layers per level."""
    slots = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(widths) for j in range(layers)]
    slots.append(("mid_block.motion_modules.0", widths[-1]))
    slots += [
        (f"up_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(reversed(widths)) for j in range(layers + 1)
    ]
    return MotionSpec(variant, tuple(slots), positions)


def motion_weights(spec: MotionSpec, seed: int = 0) -> dict[str, Tensor]:
    """Seeded tensors under the published names, none of them a no-op."""
    with torch.inference_mode(False):
        return tiny_host.randomize(MotionModel(spec), seed).state_dict()


def motion_module(
    seed: int = 0, dtype: torch.dtype = torch.float32, still: bool = False, **layout: Any
) -> MotionModule:
    """A managed motion module; `still` ones add exactly zero, so whatever the host computes must not change."""
    spec = motion_spec(**layout)
    weights = motion_weights(spec, seed)
    for name, tensor in weights.items():
        if still and ".proj_out." in name:
            tensor.zero_()
    return manage(MotionFile(spec, {name: tensor.to(dtype) for name, tensor in weights.items()}), f"tiny-{seed}")


def motion_lora(module: MotionModule, seed: int = 0, strength: float = 1.0, rank: int = 2) -> MotionModule:
    """The module with a random MotionLoRA on every query projection."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for slot, channels in module.spec.slots:
        stem = f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora"
        pairs[f"{stem}.down.weight"] = torch.randn(rank, channels, generator=generator) * 0.5
        pairs[f"{stem}.up.weight"] = torch.randn(channels, rank, generator=generator)
    return patch_motion_lora(module, read_motion_lora(pairs, f"lora-{seed}"), strength)


def inflate(image: ModelPatcher, module: MotionModule, **settings: Any) -> ModelPatcher:
    """What Apply Motion Module does, keeping the image model's noise schedule unless told otherwise."""
    return apply_motion(image, module, MotionSettings(**settings))


@dataclass
class Pair:
    """An image MODEL and motion modules for it, and what all of them were before any test touched them."""

    plain: ModelPatcher
    module: MotionModule
    still_module: MotionModule | None
    image: Tensor = field(init=False)
    rests: list[Rest] = field(init=False)

    def __post_init__(self) -> None:
        self.rests = [Rest(model) for model in (self.plain, self.module, self.still_module) if model is not None]
        self.image = tiny_host.sample(self.plain, 2, steps=1)

    def video(
        self, module: MotionModule | None = None, base: ModelPatcher | None = None, **settings: Any
    ) -> ModelPatcher:
        return inflate(base or self.plain, module or self.module, **settings)

    @property
    def still(self) -> ModelPatcher:
        """Inflated like any other, but every motion module adds zero."""
        return self.video(self.still_module)

    def assert_untouched(self) -> None:
        """Nothing of ours is left in the host's network, and it draws the image it drew at first, bit for bit."""
        self.assert_nothing_left()
        assert torch.equal(tiny_host.sample(self.plain, 2, steps=1), self.image)
        self.assert_restored()

    def assert_nothing_left(self) -> None:
        """No layer of ours among the host's, under any name, and no method replaced on any of its layers."""
        for rest in self.rests:
            rest.assert_same_layers()

    def assert_restored(self) -> None:
        """Nothing left; and, once the host has unloaded its models, every tensor is what it was, bit for bit."""
        assert_restored(self.rests)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())
