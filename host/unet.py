"""Where motion modules go in the host's UNet, and how they get there for the length of one call.

A module is inserted under a name of its own between the numbered layers of a block, so no layer of the host changes
its name, and it is not registered as the UNet's: state dicts, LoRAs and model management see the UNet they know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.ops
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel, Upsample
from torch import Tensor, nn

from ..motion_modules.animatediff.network import TemporalTransformer
from ..motion_modules.animatediff.spec import SLOT, JointNorms, MotionSpec, family_of
from ..motion_modules.call import MotionCall
from ..motion_modules.errors import ModelMismatchError
from ..motion_modules.norm import joint_group_norm

CALLS = "latentmotion_calls"
LAYER_NAME = "latentmotion_{}"


class MotionSlot(nn.Module):
    """Stands in a UNet block for one temporal transformer; owns no weights and knows nothing of the run."""

    def __init__(self, transformer: TemporalTransformer, motion: int, joint_norm: bool) -> None:
        super().__init__()
        self.held = (transformer,)  # in a tuple: not a child, so not part of the UNet's state dict
        self.motion = motion
        self.joint_norm = joint_norm

    def forward(self, x: Tensor, calls: dict[int, MotionCall]) -> Tensor:
        return self.held[0](x, calls[self.motion], self.joint_norm)


def run_slot(layer: MotionSlot, x: Tensor, emb: Any, context: Any, transformer_options: dict, *_: Any) -> Tensor:
    """The host's hook for layers it does not know: hands them this call's settings."""
    return layer(x, transformer_options[CALLS])


def _down_levels(unet: UNetModel) -> Iterator[tuple[int, nn.Module]]:
    level = 0
    for block in list(unet.input_blocks)[1:]:
        if any(isinstance(layer, ResBlock) for layer in block):
            yield level, block
        else:
            level += 1


def family(unet: UNetModel) -> str:
    """The image model in words."""
    widths: dict[int, int] = {}
    for level, block in _down_levels(unet):
        widths[level] = _channels(block)
    return family_of(tuple(widths.values()))


def _channels(block: nn.Module) -> int:
    return next((layer.out_channels for layer in block if isinstance(layer, ResBlock)), 0)


def block_of(unet: UNetModel, spec: MotionSpec, slot: str) -> nn.Module | None:
    """The UNet block a slot of the published layout stands for, or None where the UNet has no such block."""
    side, block, index = SLOT.match(slot).groups()
    per_level = len(spec.per_block("down_blocks")[0])
    if side == "mid_block":
        return unet.middle_block
    blocks = unet.input_blocks if side == "down_blocks" else unet.output_blocks
    offset = 1 if side == "down_blocks" else 0
    number = (per_level + 1) * int(block) + int(index) + offset
    return blocks[number] if number < len(blocks) else None


def check_fit(unet: Any, spec: MotionSpec, name: str) -> None:
    """Raise ModelMismatchError, naming both sides, unless every slot exists in this UNet with the same width."""
    if not isinstance(unet, UNetModel):
        raise ModelMismatchError(f"{name} is a motion module for {spec.family}, and this MODEL is a "
                                 f"{type(unet).__name__}, which has no place for it. Use an SD1.x or SDXL model.")
    levels = len(spec.per_block("down_blocks")) * (len(spec.per_block("down_blocks")[0]) + 1)
    fits = levels == len(unet.input_blocks)
    for slot, channels in spec.slots:
        block = block_of(unet, spec, slot)
        fits = fits and block is not None and _channels(block) == channels
    if not fits:
        raise ModelMismatchError(f"{name} is a motion module for {spec.family}, and this MODEL is {family(unet)}. "
                                 f"Choose a motion module for {family(unet)}, or load a checkpoint of {spec.family}.")


def _insert(block: nn.Module, slot: MotionSlot, middle: bool) -> None:
    """Put a slot behind the block's transformer (or residual layer), before what follows it."""
    layers = list(block._modules.items())
    last = len(layers)
    if middle:
        last -= 1
    elif isinstance(layers[-1][1], Upsample):
        last -= 1
    # Slots of other motion modules are already there: the order of application is the order on the canvas.
    layers.insert(last, (LAYER_NAME.format(slot.motion), slot))
    block._modules.clear()
    block._modules.update(layers)


def joint_norms(unet: UNetModel, joint: JointNorms) -> Iterator[nn.GroupNorm]:
    """GroupNorms of the image UNet that must see all frames of a clip."""
    for module in unet.modules():
        if joint.resnet and isinstance(module, ResBlock):
            yield module.in_layers[0]
            yield module.out_layers[0]
        if joint.transformer and isinstance(module, SpatialTransformer):
            yield module.norm
    if joint.out:
        yield unet.out[0]


def host_affine(norm: nn.GroupNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one of the host's norms, from wherever the host keeps them."""
    return comfy.ops.cast_bias_weight(norm, like)


@contextmanager
def inflated(unet: UNetModel, slots: Iterable[tuple[nn.Module, MotionSlot]], norms: Iterable[nn.GroupNorm],
             frames: int) -> Iterator[None]:
    """Make an image UNet a video UNet while the context lasts; afterwards it is the object it was.

    slots: (block of the UNet, slot to put into it). norms: those to compute over all `frames` of a clip.
    """
    saved: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    patched: list[nn.GroupNorm] = []
    try:
        for block, slot in slots:
            saved.append((block, dict(block._modules)))
            _insert(block, slot, middle=block is unet.middle_block)
        for norm in norms:
            if "forward" not in norm.__dict__:
                patched.append(norm)
                norm.forward = partial(joint_group_norm, norm, frames=frames, affine=host_affine)
        yield
    finally:
        for norm in patched:
            del norm.__dict__["forward"]
        for block, modules in reversed(saved):
            block._modules.clear()
            block._modules.update(modules)
