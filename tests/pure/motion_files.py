"""Small motion module files in every layout of names, for the tests that read them."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import reference_motion as reference
import torch
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.spec import MotionSpec
from torch import Tensor, nn

NARROW = (32, 64, 32, 32)
TO_DIFFUSERS = (("temporal_transformer.", ""), ("attention_blocks.0.", "attn1."), ("attention_blocks.1.", "attn2."),
                (".norms.0.", ".norm1."), (".norms.1.", ".norm2."), (".ff_norm.", ".norm3."))


def slots(levels: tuple[int, ...] = NARROW, mid: bool = False) -> tuple[tuple[str, int], ...]:
    """Published slots of a module, in the order down, mid, up."""
    down = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(levels) for j in range(2)]
    up = [(f"up_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(levels[::-1]) for j in range(3)]
    return (*down, *([("mid_block.motion_modules.0", levels[-1])] if mid else []), *up)


def module(levels: tuple[int, ...] = NARROW, mid: bool = False, length: int | None = 32,
           device: str | None = None) -> dict[str, Tensor]:
    """A motion module file in the authors' layout, seeded; `length` rows of positions, None without them."""
    return dict(_module(levels, mid, length, device))


@functools.cache
def _module(levels: tuple[int, ...], mid: bool, length: int | None, device: str | None) -> dict[str, Tensor]:
    layout = MotionModel(MotionSpec(specs.V3, slots(levels, mid), 32), nn, device="meta").state_dict()
    shapes = {name: tensor.shape for name, tensor in layout.items()}
    file = {name: torch.empty(shape, device=device) for name, shape in shapes.items()} if device else \
        reference.random_weights(shapes, 0)
    for slot, c in slots(levels, mid) if length else ():
        for i in range(2):
            key = f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe"
            file[key] = reference.position_table(torch.arange(length), c)[None].float() if not device else \
                torch.empty(1, length, c, device=device)
    return file


def plain(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in file.items() if "pos_encoder" not in name}


def renamed(file: Mapping[str, Any], *pairs: tuple[str, str]) -> dict[str, Any]:
    out = {}
    for name, tensor in file.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def hotshot(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(file, (".motion_modules.", ".temporal_attentions."), (".temporal_transformer.", "."),
                   ("pos_encoder.pe", "pos_encoder.positional_encoding"))


def diffusers(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names, with the one positional table a transformer block keeps there."""
    tables = {n.partition("attention_blocks")[0] + "pos_embed.pe": t for n, t in file.items() if "pos_encoder" in n}
    return renamed(plain(file) | tables, *TO_DIFFUSERS)


def prefixed(file: Mapping[str, Tensor], *front: str) -> dict[str, Tensor]:
    return {"".join(front) + name: tensor for name, tensor in file.items()}


def image_unet() -> dict[str, Tensor]:
    """Some of the image tensors that stand beside the motion modules in a training dump."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    return {"conv_in.weight": torch.zeros(32, 4, 3, 3), "conv_in.bias": torch.zeros(32),
            "down_blocks.0.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3),
            f"{block}.attn1.to_q.weight": torch.zeros(32, 32), f"{block}.attn2.to_k.weight": torch.zeros(32, 16),
            f"{block}.norm1.weight": torch.zeros(32), "conv_out.weight": torch.zeros(4, 32, 3, 3)}


def motion_lora() -> dict[str, Tensor]:
    stem = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q"
    return {f"{stem}_lora.down.weight": torch.zeros(4, 32), f"{stem}_lora.up.weight": torch.zeros(32, 4)}


def bytes_of(payload: object, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, **how)
    return buffer.getvalue()
