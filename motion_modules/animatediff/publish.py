"""Motion modules as files of the published layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import ModelMismatchError
from .checkpoint import variant_of
from .network import MotionModel, sinusoid
from .spec import ANIMATE_LCM, HOTSHOT_XL, V3, MotionSpec, family_of

POSITIONS = 32


def published(spec: MotionSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that is read back as this layout: the weights, and the tables of positions it has.

    weights: under the authors' names, as in `MotionModel`. Source: the releases named in `checkpoint.py`.
    """
    tensors = dict(weights)
    table = "positional_encoding" if spec.variant is HOTSHOT_XL else "pe"
    for slot, channels in spec.slots if spec.variant is not ANIMATE_LCM else ():
        rows = sinusoid(torch.arange(spec.positions), channels)[None]
        for i in range(spec.attentions):
            key = f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}.pos_encoder.{table}"
            tensors[key] = rows.clone()
    if spec.variant is not HOTSHOT_XL:
        return tensors
    return {_hotshot(key): tensor for key, tensor in tensors.items()}


def _hotshot(key: str) -> str:
    slot, _, rest = key.partition(".temporal_transformer.")
    block, _, index = slot.partition(".motion_modules.")
    return f"{block}.temporal_attentions.{index}.{rest}"


def new_spec(widths: Sequence[int], layers: int, with_mid: bool, convolves: bool = False) -> MotionSpec:
    """The layout of a module for a UNet of these widths (finest first) and residual layers per level, as AnimateDiff's.

    convolves: with the convolutions over frames of the paper's ablation in place of attention.
    Raises ModelMismatchError for widths that 32 norm groups do not divide.
    """
    if any(width % 32 for width in widths):
        found = family_of(tuple(widths), layers)
        raise ModelMismatchError(f"No motion module fits {found}: each width must be a multiple of 32.")
    slots = [(f"down_blocks.{i}.motion_modules.{j}", width) for i, width in enumerate(widths) for j in range(layers)]
    slots += [("mid_block.motion_modules.0", widths[-1])] if with_mid else []
    for i, width in enumerate(reversed(widths)):
        slots += [(f"up_blocks.{i}.motion_modules.{j}", width) for j in range(layers + 1)]
    spec = MotionSpec(V3, tuple(slots), POSITIONS, attentions=0 if convolves else 2)
    return replace(spec, variant=variant_of(spec, POSITIONS, "original"))


def still_module(spec: MotionSpec, seed: int) -> MotionModel:
    """A new motion module, float32, that changes nothing yet: its output projections are zero, the rest is random.

    Source: AnimateDiff, arXiv 2307.04725, section 4.2; the random part is torch's own, as in the authors' code.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MotionModel(spec, nn)
    for transformer in network.transformers().values():
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
    return network
