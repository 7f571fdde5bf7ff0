"""Motion module files: told apart by their tensors, renamed to one layout, checked whole before anything is built.

Source of the layouts and markers: the releases of guoyww/AnimateDiff, hotshotco/Hotshot-XL, G-U-N/AnimateLCM,
open-mmlab/PIA and huggingface/diffusers (file formats only).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .network import MotionModel
from .spec import ANIMATE_LCM, HOTSHOT_XL, SDXL_BETA, SDXL_LEVELS, SLOT, V1, V2, V3, MotionSpec, Variant

POSITIONS = re.compile(r"\.(?:pos_encoder|pos_embed)\.(?:pe|positional_encoding|pos_encoding)$")
SLOT_KEY = re.compile(r"^((?:down_blocks|up_blocks)\.\d+|mid_block)\.(motion_modules|temporal_attentions)\.(\d+)\.(.+)$")
DIFFUSERS_NAMES = (
    ("attn1.", "attention_blocks.0."),
    ("attn2.", "attention_blocks.1."),
    ("norm1.", "norms.0."),
    ("norm2.", "norms.1."),
    ("norm3.", "ff_norm."),
    ("pos_embed.", "attention_blocks.0.pos_encoder."),
)
PE_LENGTH_UNWRITTEN = {"original": 64, "diffusers": 32, "hotshot": 24}


@dataclass(frozen=True)
class MotionFile:
    """A motion module ready to be loaded: its layout and its tensors under the published names."""

    spec: MotionSpec
    weights: dict[str, Tensor]


def unwrap(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a training dump: out of `state_dict`, without `module.` in front, without anything else."""
    for key in ("state_dict", "controlnet"):
        if isinstance(payload.get(key), Mapping):
            payload = payload[key]
    return {str(k).removeprefix("module."): v for k, v in payload.items() if isinstance(v, Tensor)}


def read_motion_module(payload: Mapping[str, Any], name: str) -> MotionFile:
    """Identify a motion module and return its layout and tensors.

    `name` is used in messages. Raises CheckpointError with a sentence for the person who chose the file.
    """
    tensors = unwrap(payload)
    refuse_other_files(tensors, name)
    layout = _layout_of(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        found = SLOT_KEY.match(key.removeprefix("unet."))
        if found:
            renamed[_published_name(found, layout)] = tensor
    lengths = {tensor.shape[1] for key, tensor in renamed.items() if POSITIONS.search(key) and tensor.ndim == 3}
    weights = {key: tensor for key, tensor in renamed.items() if not POSITIONS.search(key)}
    if len(lengths) > 1:
        raise CheckpointError(f"{name}: its positional tables have different lengths ({sorted(lengths)}); "
                              "the file is damaged or mixes two motion modules.")
    spec = _spec_of(weights, lengths.pop() if lengths else None, layout, name)
    _check_whole(spec, weights, name)
    return MotionFile(spec, weights)


def _layout_of(tensors: Mapping[str, Tensor]) -> str:
    if any(".temporal_attentions." in key for key in tensors):
        return "hotshot"
    if any(".temporal_transformer." in key for key in tensors):
        return "original"
    return "diffusers"


def _published_name(found: re.Match[str], layout: str) -> str:
    block, _, index, rest = found.groups()
    rest = rest.removeprefix("temporal_transformer.")
    if layout == "diffusers":
        head, dot, tail = rest.partition("transformer_blocks.0.")
        for theirs, ours in DIFFUSERS_NAMES:
            if dot and tail.startswith(theirs):
                rest = f"{head}{dot}{ours}{tail.removeprefix(theirs)}"
    return f"{block}.motion_modules.{index}.temporal_transformer.{rest}"


def _spec_of(weights: Mapping[str, Tensor], length: int | None, layout: str, name: str) -> MotionSpec:
    slots = {}
    attentions = set()
    for key, tensor in weights.items():
        slot, _, rest = key.partition(".temporal_transformer.")
        if rest == "norm.weight" and tensor.ndim == 1:
            slots[slot] = int(tensor.shape[0])
        found = re.match(r"transformer_blocks\.0\.attention_blocks\.(\d+)\.", rest)
        if found:
            attentions.add(int(found[1]))
    if not slots or not attentions:
        raise CheckpointError(f"{name}: has motion module tensors, but no complete block; the file is damaged.")
    ordered = tuple(sorted(slots.items(), key=lambda item: _slot_order(item[0])))
    for slot, width in ordered:
        if width % 32:
            raise CheckpointError(f"{name}: {slot} is {width} channels wide, which 32 norm groups do not divide; "
                                  "the file is damaged.")
    positions = length or PE_LENGTH_UNWRITTEN[layout]
    spec = MotionSpec(V3, ordered, positions, attentions=max(attentions) + 1)
    _check_slots(spec, name)
    return MotionSpec(_variant_of(spec, length, layout), ordered, positions, attentions=spec.attentions)


def _slot_order(slot: str) -> tuple[int, int, int]:
    side, block, index = SLOT.match(slot).groups()
    return ("down_blocks", "mid_block", "up_blocks").index(side), int(block or 0), int(index)


def _check_slots(spec: MotionSpec, name: str) -> None:
    """Blocks and their modules must be numbered without gaps, up blocks one module longer than down blocks."""
    downs, ups = spec.per_block("down_blocks"), spec.per_block("up_blocks")
    wanted = [f"down_blocks.{i}.motion_modules.{j}" for i in downs for j in range(len(downs[0]) if 0 in downs else 0)]
    wanted += [f"up_blocks.{i}.motion_modules.{j}" for i in ups for j in range(len(ups[0]) if 0 in ups else 0)]
    wanted += ["mid_block.motion_modules.0"] if spec.has_mid else []
    regular = (
        downs and sorted(downs) == list(range(len(downs))) and sorted(downs) == sorted(ups)
        and len(ups[0]) == len(downs[0]) + 1 and sorted(wanted) == sorted(slot for slot, _ in spec.slots)
    )
    if not regular:
        raise CheckpointError(f"{name}: its blocks do not make a whole motion module ({len(spec.slots)} modules in "
                              f"{len(downs)} down and {len(ups)} up blocks); the file is cut short or mixed.")


def _variant_of(spec: MotionSpec, length: int | None, layout: str) -> Variant:
    if layout == "hotshot":
        return HOTSHOT_XL
    if spec.levels == SDXL_LEVELS and not spec.has_mid:
        return SDXL_BETA
    if length is None and layout == "original":
        return ANIMATE_LCM
    if spec.has_mid:
        return V2
    return V1 if length == 24 else V3


def _check_whole(spec: MotionSpec, weights: Mapping[str, Tensor], name: str) -> None:
    """Every tensor there, of the right shape and finite; nothing left over."""
    expected = {key: tensor.shape for key, tensor in MotionModel(spec, nn, device="meta").state_dict().items()}
    missing = [key for key in expected if key not in weights]
    surplus = [key for key in weights if key not in expected]
    for keys, what in ((missing, "lacks"), (surplus, "has unknown")):
        if keys:
            raise CheckpointError(f"{name}: {what} {len(keys)} tensors of a motion module, such as "
                                  f"{', '.join(keys[:5])}. The file is damaged or of an unknown kind.")
    for key, shape in expected.items():
        tensor = weights[key]
        if tensor.shape != shape:
            raise CheckpointError(f"{name}: {key} has shape {tuple(tensor.shape)} where {tuple(shape)} is needed; "
                                  "the file is damaged.")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name}: {key} holds {tensor.dtype} numbers; weights must be floating point.")
        check = tensor if tensor.element_size() > 1 else tensor.to(torch.float16)
        if not torch.isfinite(check).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinite values; download or train the file again.")


Test = Callable[[Mapping[str, Tensor]], bool]


def _any(part: str) -> Test:
    return lambda tensors: any(part in key for key in tensors)


def _pia(tensors: Mapping[str, Tensor]) -> bool:
    return "conv_in.weight" in tensors and tensors["conv_in.weight"].ndim == 4 and \
        tensors["conv_in.weight"].shape[1] == 9 and not _any(".resnets.")(tensors)


def _is_lora(tensors: Mapping[str, Tensor]) -> bool:
    return bool(tensors) and all(("lora" in key or key.endswith(".alpha")) for key in tensors)


def _has_motion(tensors: Mapping[str, Tensor]) -> bool:
    return any(SLOT_KEY.match(key.removeprefix("unet.")) for key in tensors)


OTHER_FILES: tuple[tuple[Test, str], ...] = (
    (lambda t: not t, "holds no tensors at all. Choose a motion module, such as mm_sd_v15_v2 or v3_sd15_mm."),
    (lambda t: _is_lora(t) and _has_motion(t),
     "is a MotionLoRA, which changes a motion module but is not one. Load a motion module here and put this file "
     "into Load MotionLoRA."),
    (_is_lora, "is a LoRA for an image model. Use the LoraLoader node for it."),
    (lambda t: _any("controlnet_cond_embedding")(t) or _any("controlnet_down_blocks")(t),
     "is a SparseCtrl encoder (a ControlNet for video), not a motion module. Load it with a ControlNet loader that "
     "knows SparseCtrl, and choose v3_sd15_mm here."),
    (_any("FancyVideo"), "is a FancyVideo module, which needs its own frame-rate and motion inputs; it is not "
     "supported."),
    (_any("img_encoder."), "is AnimateLCM-I2V, which needs its image encoder run beside it; it is not supported yet. "
     "AnimateLCM_sd15_t2v works."),
    (_pia, "is PIA, which needs a nine-channel input layer and a reference image; it is not supported yet. "
     "v3_sd15_mm has the same layout and works."),
    (_any("cc_projection."), "is a MotionCtrl camera module; it is not supported."),
    (_any("qkv_merge"), "is a CameraCtrl module; it is not supported."),
    (lambda t: _any("model.diffusion_model.")(t) and not _has_motion(t),
     "is a whole image checkpoint. Load it with Load Checkpoint, and choose a motion module here."),
    (lambda t: not _has_motion(t) and (_any("decoder.up")(t) or _any("encoder.down")(t)),
     "is a VAE. Use the Load VAE node for it."),
    (lambda t: not _has_motion(t), "holds no motion module. Choose a file such as mm_sd_v15_v2, v3_sd15_mm, "
     "mm_sdxl_v10_beta, hsxl_temporal_layers or AnimateLCM_sd15_t2v."),
)


def refuse_other_files(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise a CheckpointError that says what the file is, if it is anything but a motion module."""
    for test, sentence in OTHER_FILES:
        if test(tensors):
            raise CheckpointError(f"{name} {sentence}")
