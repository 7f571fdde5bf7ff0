"""Where motion modules go in the host's UNet, and how they get there for the length of one call.

A module is inserted under a name of its own between the numbered layers of a block, so no layer of the host changes
its name, and it is not registered as the UNet's: state dicts, LoRAs and model management see the UNet they know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.ops
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel, Upsample, VideoResBlock
from torch import Tensor, nn

from ..motion_modules.animatediff.network import TemporalTransformer
from ..motion_modules.animatediff.spec import DEMO, SLOT, JointNorms, MotionSpec, family_of
from ..motion_modules.call import MotionCall
from ..motion_modules.errors import ModelMismatchError
from ..motion_modules.norm import joint_group_norm

CALLS = "latentmotion_calls"  # published in transformer_options for wrappers further in; the layers hold their own
LAYER_NAME = "latentmotion_{}"


class MotionSlot(nn.Module):
    """Stands in a UNet block for one temporal transformer during one call; owns no weights.

    It carries the call itself: the host's TorchCompileModel may drop every guard on what `transformer_options` hold,
    and a compiled UNet would then go on with the frames and strengths it was compiled with.
    """

    def __init__(self, transformer: TemporalTransformer, call: MotionCall, joint_norm: bool = False) -> None:
        super().__init__()
        self.held = (transformer,)  # in a tuple: not a child, so not part of the UNet's state dict
        self.call = call
        self.joint_norm = joint_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x, self.call, self.joint_norm)


def _widths(unet: UNetModel) -> list[list[int]]:
    """Of each level, finest first, the widths of its residual layers."""
    levels: list[list[int]] = [[]]
    for block in list(unet.input_blocks)[1:]:
        if any(isinstance(layer, ResBlock) for layer in block):
            levels[-1].append(_channels(block))
        else:
            levels.append([])
    return [widths for widths in levels if widths]


def family(unet: UNetModel) -> str:
    """The image model in words."""
    levels = _widths(unet)
    return family_of(tuple(widths[0] for widths in levels), max(map(len, levels)))


def levels_of(unet: Any) -> tuple[tuple[int, ...], int]:
    """Widths of the UNet's levels, finest first, and how many residual layers each has.

    Raises ModelMismatchError for a network that motion modules have no place in.
    """
    if not isinstance(unet, UNetModel) or any(isinstance(module, VideoResBlock) for module in unet.modules()):
        raise ModelMismatchError(f"This MODEL is a {type(unet).__name__}, which has no place for AnimateDiff. Use an "
                                 "image model of SD1.x, SD2.x or SDXL.")
    levels = _widths(unet)
    counts = {len(widths) for widths in levels}
    if len(counts) > 1:
        raise ModelMismatchError("The levels of this UNet have different numbers of layers, and motion modules have as "
                                 "many on each. Use an image model of SD1.x, SD2.x or SDXL.")
    return tuple(widths[0] for widths in levels), counts.pop()


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
    if any(isinstance(module, VideoResBlock) for module in unet.modules()):
        raise ModelMismatchError(f"{name} is a motion module for image models, and this MODEL makes video by itself "
                                 "(Stable Video Diffusion). Use an SD1.x or SDXL model.")
    levels = len(spec.per_block("down_blocks")) * (len(spec.per_block("down_blocks")[0]) + 1)
    fits = levels == len(unet.input_blocks)
    for slot, channels in spec.slots:
        block = block_of(unet, spec, slot)
        fits = fits and block is not None and _channels(block) == channels
    if not fits:
        load = "use Load Demo Models" if spec.family == DEMO else f"load a checkpoint of {spec.family}"
        raise ModelMismatchError(f"{name} is a motion module for {spec.family}, and this MODEL is {family(unet)}. "
                                 f"Choose a motion module for {family(unet)}, or {load}.")


def _insert(block: nn.Module, slot: MotionSlot, middle: bool) -> None:
    """Put a slot behind the block's transformer (or residual layer), before what follows it."""
    layers = list(block._modules.items())
    last = len(layers)
    if middle:
        last -= 1
    elif isinstance(layers[-1][1], Upsample):
        last -= 1
    # Slots of other motion modules are already there: the order of application is the order on the canvas.
    others = sum(isinstance(layer, MotionSlot) for _, layer in layers)
    layers.insert(last, (LAYER_NAME.format(others), slot))
    block._modules.clear()
    block._modules.update(layers)


def joint_norms(unet: UNetModel, joint: JointNorms) -> Iterator[tuple[nn.Module, str]]:
    """GroupNorms of the image UNet that must see all frames of a clip, as (module that holds it, name there)."""
    for module in unet.modules():
        if joint.resnet and isinstance(module, ResBlock):
            yield module.in_layers, "0"
            yield module.out_layers, "0"
        if joint.transformer and isinstance(module, SpatialTransformer):
            yield module, "norm"
    if joint.out:
        yield unet.out, "0"


def host_affine(norm: nn.GroupNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one of the host's norms, from wherever the host keeps them."""
    weight, bias, lent = comfy.ops.cast_bias_weight(norm, like, offloadable=True)
    if lent is None:
        return weight, bias
    copies = weight.clone(), bias.clone()  # what the host lends has to be given back
    comfy.ops.uncast_bias_weight(norm, weight, bias, lent)
    return copies


class JointNorm(nn.Module):
    """Stands for one of the UNet's GroupNorms during one call; takes its statistics over the frames of each clip."""

    def __init__(self, norm: nn.GroupNorm, frames: int) -> None:
        super().__init__()
        self.held = (norm,)
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        return joint_group_norm(self.held[0], x, self.frames, host_affine)


def place_frames(unet: UNetModel, options: dict[str, Any], positions: Tensor) -> None:
    """Tell an inflated UNet, and the `options` it is called with, of which frames the next calls are: their places in
    time, (f,)."""
    count = len(positions)

    def placed(call: MotionCall) -> MotionCall:
        return replace(call, frames=count, positions=positions.to(call.positions))

    for module in unet.modules():
        if isinstance(module, MotionSlot):
            module.call = placed(module.call)
        elif isinstance(module, JointNorm):
            module.frames = count
    options[CALLS] = {number: placed(call) for number, call in options.get(CALLS, {}).items()}


@contextmanager
def inflated(unet: UNetModel, slots: Iterable[tuple[nn.Module, MotionSlot]], norms: Iterable[tuple[nn.Module, str]],
             frames: int) -> Iterator[None]:
    """Make an image UNet a video UNet while the context lasts; afterwards it is the object it was.

    slots: (block of the UNet, slot to put into it). norms: those to compute over all `frames` of a clip.
    """
    saved: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        for block, slot in slots:
            saved.append((block, dict(block._modules)))
            _insert(block, slot, middle=block is unet.middle_block)
        for holder, name in list(norms):
            if not isinstance(holder._modules[name], JointNorm):
                saved.append((holder, dict(holder._modules)))
                holder._modules[name] = JointNorm(holder._modules[name], frames)
        yield
    finally:
        for holder, modules in reversed(saved):
            holder._modules.clear()
            holder._modules.update(modules)
