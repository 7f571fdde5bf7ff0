"""MotionLoRA files: low-rank changes of a motion module's projections, in every published key dialect.

Source: guoyww/AnimateDiff (`processor.to_q_lora.down`), AnimateDiff-MotionDirector (`to_out.0`, `ff.net`) and
diffusers (`unet.` prefix, `attn1`); file formats only. W += strength * up @ down, no alpha unless one is in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ModelMismatchError
from .checkpoint import DIFFUSERS_NAMES, unwrap
from .spec import MotionSpec

PLACE = (r"^((?:down|up)_blocks\.\d+|mid_block)\.(?:motion_modules|temporal_attentions)\.(\d+)\."
         r"(?:temporal_transformer\.)?")
PART = re.compile(PLACE + r"(.+?)[._]lora[._](down|up|A|B)(?:\.default)?\.weight$")
ALPHA = re.compile(PLACE + r"(.+?)(?:[._]lora)?\.alpha$")
SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}


@dataclass(frozen=True)
class LowRank:
    """One change: up (out, r) @ down (r, in), times alpha / r where the file says alpha."""

    up: Tensor
    down: Tensor
    alpha: float | None = None


@dataclass(frozen=True)
class MotionLora:
    """Changes by the published name of the weight they change, such as `...attention_blocks.0.to_q.weight`."""

    name: str
    parts: dict[str, LowRank]

    @property
    def rank(self) -> int:
        return max(part.down.shape[0] for part in self.parts.values())


def _target(block: str, index: str, rest: str) -> str:
    """Published weight name of a LoRA pair: `processor` dropped, diffusers' names translated."""
    rest = ".".join(piece for piece in rest.split(".") if piece != "processor")
    head, dot, tail = rest.partition("transformer_blocks.0.")
    for theirs, ours in DIFFUSERS_NAMES:
        if dot and tail.startswith(theirs):
            rest = f"{head}{dot}{ours}{tail.removeprefix(theirs)}"
    if rest.endswith(".to_out"):
        rest += ".0"
    return f"{block}.motion_modules.{index}.temporal_transformer.{rest}.weight"


def read_motion_lora(payload: Mapping[str, Any], name: str) -> MotionLora:
    """Identify a MotionLoRA. Raises CheckpointError with a sentence for the person who chose the file."""
    tensors = unwrap(payload)
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        found = PART.match(key)
        if found:
            block, index, rest, side = found.groups()
            sides.setdefault(_target(block, index, rest), {})[SIDES[side]] = tensor
        elif found := ALPHA.match(key):
            alphas[_target(*found.groups())] = _alpha(key, tensor, name)
    if not sides:
        raise CheckpointError(f"{name} {_what_else(tensors)}")
    if unknown := sorted(alphas.keys() - sides.keys()):
        raise CheckpointError(f"{name}: {unknown[0]} has an alpha but no change; the file is damaged.")
    return MotionLora(name, {key: _pair(key, pair, alphas.get(key), name) for key, pair in sides.items()})


def _pair(key: str, pair: Mapping[str, Tensor], alpha: float | None, name: str) -> LowRank:
    if set(pair) != {"up", "down"}:
        raise CheckpointError(f"{name}: {key} has only its {next(iter(pair))} half; the file is damaged.")
    up, down = pair["up"], pair["down"]
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise CheckpointError(f"{name}: the halves of {key} do not fit each other ({tuple(up.shape)} and "
                              f"{tuple(down.shape)}); the file is damaged.")
    for half in (up, down):
        if not half.is_floating_point():
            raise CheckpointError(f"{name}: {key} holds {half.dtype} numbers; weights must be floating point.")
        if not torch.isfinite(half.float()).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinite values; download or train the file again.")
    return LowRank(up, down, alpha)


def _alpha(key: str, tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or not torch.isfinite(tensor.float()).all():
        raise CheckpointError(f"{name}: {key} is not one finite number; the file is damaged.")
    return float(tensor)


def _what_else(tensors: Mapping[str, Tensor]) -> str:
    """What a file is that holds no change of a motion module."""
    if any("lora" in key for key in tensors):
        return ("is a LoRA for an image model (a domain adapter, perhaps). Move it to models/loras and use the Load "
                "LoRA node for it.")
    if any("motion_modules." in key or "temporal_attentions." in key for key in tensors):
        return "is a motion module, not a MotionLoRA. Load it with Load Motion Module."
    if any("model.diffusion_model." in key for key in tensors):
        return "is a whole image checkpoint, not a MotionLoRA. Load it with Load Checkpoint."
    if not tensors:
        return "holds no tensors at all. Choose a MotionLoRA, such as v2_lora_ZoomIn."
    return f"is not a MotionLoRA: none of its {len(tensors)} tensors changes a motion module."


def parts_for(lora: MotionLora, spec: MotionSpec, shapes: Mapping[str, torch.Size]) -> dict[str, LowRank]:
    """The changes that fit this module. Only those of a mid block the module lacks are left out.

    shapes: published weight name -> shape of that weight in the module.
    Raises ModelMismatchError when the LoRA was made for a module of another layout.
    """
    fitting = {}
    for key, part in lora.parts.items():
        if key.startswith("mid_block.") and not spec.has_mid:
            continue
        expected = (part.up.shape[0], part.down.shape[1])
        if key not in shapes or tuple(shapes[key]) != expected:
            found = f"has shape {tuple(shapes[key])}" if key in shapes else "does not exist"
            raise ModelMismatchError(
                f"{lora.name} does not fit this {spec.variant.name} motion module ({spec.family}): it changes {key} "
                f"of shape {expected}, which {found} there. Choose a MotionLoRA made for {spec.family}.")
        fitting[key] = part
    if not fitting:
        raise ModelMismatchError(f"{lora.name} changes the mid block only, which this {spec.variant.name} motion "
                                 "module does not have. Choose an AnimateDiff v2 motion module for it.")
    return fitting


def published_key(layer: str) -> str:
    """The authors' key of a change to an attention projection of this name, without `.down.weight`."""
    return layer.removesuffix(".0").replace(".to_", ".processor.to_") + "_lora"
