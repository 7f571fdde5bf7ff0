"""Which layers of a UNet hold the memory of a training run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from torch import nn

from ..motion_modules.animatediff.spec import MotionSpec
from ..training.estimate import Layer
from .unet import block_of

TOKENS = 77  # of a caption


def heavy_layers(unet: UNetModel) -> Iterator[nn.Module]:
    """Residual layers and transformers: what is worth computing twice to keep less."""
    return (layer for layer in unet.modules() if isinstance(layer, (ResBlock, SpatialTransformer)))


def layers_of(unet: UNetModel, spec: MotionSpec | None, size: tuple[int, int], frames: int,
              device: torch.device) -> list[Layer]:  # fmt: skip
    """The heavy layers of the UNet and of a motion module in it, for latents of this (height, width)."""
    tables = device.type == "cpu"  # see training/attention.py
    moved = {id(block_of(unet, spec, slot)): channels for slot, channels in (spec.slots if spec else ())}
    pixels, found = size[0] * size[1], []
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        if id(block) in moved:
            channels = moved[id(block)]
            scores = spec.heads * frames * pixels * tables
            found.append(Layer("motion", channels, pixels, scores, scores))
        for layer in block:
            if isinstance(layer, ResBlock):
                found.append(Layer("residual", max(layer.channels, layer.out_channels), pixels))
            elif isinstance(layer, SpatialTransformer):
                rows = layer.transformer_blocks[0].n_heads * pixels * tables
                depth = len(layer.transformer_blocks)
                found.append(Layer("transformer", layer.in_channels, pixels, rows * pixels, rows * TOKENS, depth))
            elif isinstance(layer, Downsample):
                pixels = max(1, pixels // 4)
            elif isinstance(layer, Upsample):
                pixels *= 4
    return found
