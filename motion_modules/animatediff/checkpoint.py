"""Motion module files: told apart by their tensors, renamed to one layout, checked whole before anything is built.

Source of the layouts and markers: the releases of guoyww/AnimateDiff, hotshotco/Hotshot-XL, G-U-N/AnimateLCM,
open-mmlab/PIA and huggingface/diffusers (file formats only).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .network import MotionModel
from .spec import (
    ANIMATE_LCM,
    CONVOLUTION,
    HOTSHOT_XL,
    SDXL_BETA,
    SDXL_LEVELS,
    SLOT,
    V1,
    V2,
    V3,
    MotionSpec,
    Variant,
)

ADAPTER_KEY = re.compile(r"^(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]\."
                         r"processor\.to_(?:q|k|v|out)_lora\.(?:down|up)\.weight$")
POSITIONS = re.compile(r"\.(?:pos_encoder|pos_embed)\.(?:pe|positional_encoding|pos_encoding)$")
SLOT_KEY = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block)\.(motion_modules|temporal_attentions)\.(\d+)\.(.+)$")
DIFFUSERS_NAMES = (
    ("attn1.", "attention_blocks.0."),
    ("attn2.", "attention_blocks.1."),
    ("norm1.", "norms.0."),
    ("norm2.", "norms.1."),
    ("norm3.", "ff_norm."),
    ("pos_embed.", "attention_blocks.0.pos_encoder."),
)
WRAPPERS = ("state_dict", "model_state_dict", "ema", "controlnet", "module", "model", "unet", "motion_module")
WRAPPING_DEPTH = 4
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|controlnet|unet|motion_module|base_model\.model)\.)+")


@dataclass(frozen=True)
class MotionFile:
    """A motion module ready to be loaded: its layout and its tensors under the published names."""

    spec: MotionSpec
    weights: dict[str, Tensor]


def unwrap(payload: Mapping[str, Any], depth: int = WRAPPING_DEPTH) -> dict[str, Tensor]:
    """Tensors of a training dump: out of `state_dict` and the like, without `module.` in front, nothing else.

    Tensors in any other mapping keep its name in front, so that they still tell what the file is.
    """
    if isinstance(payload.get("state_dict"), Mapping):
        payload = payload["state_dict"]
    tensors: dict[str, Tensor] = {}
    for key, value in payload.items():
        if isinstance(value, Tensor) and value.layout is torch.strided:
            tensors[PREFIXES.sub("", str(key))] = value
        elif isinstance(value, Mapping) and depth:
            front = "" if key in WRAPPERS else f"{key}."
            tensors |= {f"{front}{name}": tensor for name, tensor in unwrap(value, depth - 1).items()}
    return tensors


def read_motion_module(payload: Mapping[str, Any], name: str) -> MotionFile:
    """Identify a motion module and return its layout and tensors.

    `name` is used in messages. Raises CheckpointError with a sentence for the person who chose the file.
    """
    tensors = unwrap(payload)
    refuse_other_files(tensors, name)
    layout = _layout_of(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        found = SLOT_KEY.match(key)
        if found:
            renamed[_published_name(found, layout)] = tensor
    length = _table_length({key: tensor for key, tensor in renamed.items() if POSITIONS.search(key)}, name)
    weights = {key: tensor for key, tensor in renamed.items() if not POSITIONS.search(key)}
    spec = _spec_of(weights, length, layout, name)
    _check_whole(spec, weights, name)
    return MotionFile(spec, weights)


def _table_length(tables: Mapping[str, Tensor], name: str) -> int | None:
    """Frames the positional tables were made for, None where the file has none. Their values follow from that."""
    for key, table in tables.items():
        if table.ndim != 3 or table.shape[0] != 1 or not table.shape[1]:
            raise CheckpointError(f"{name}: {key} has shape {tuple(table.shape)} where (1, frames, channels) is "
                                  "needed; the file is damaged.")
    lengths = {int(table.shape[1]) for table in tables.values()}
    if len(lengths) > 1:
        raise CheckpointError(f"{name}: its positional tables have different lengths ({sorted(lengths)}); "
                              "the file is damaged or mixes two motion modules.")
    return lengths.pop() if lengths else None


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
    convolves = any(".transformer_blocks.0.convolutions." in key for key in weights)
    # Numbers without gaps also bound the network that is built from them to the number of tensors in the file.
    if not slots or not (attentions or convolves) or attentions != set(range(len(attentions))):
        raise CheckpointError(f"{name}: has motion module tensors, but no complete block; the file is damaged.")
    ordered = tuple(sorted(slots.items(), key=lambda item: _slot_order(item[0])))
    for slot, width in ordered:
        if width % 32 or not width:
            raise CheckpointError(f"{name}: {slot} is {width} channels wide, which 32 norm groups do not divide; "
                                  "the file is damaged.")
    spec = MotionSpec(V3, ordered, length or 0, attentions=len(attentions))
    _check_slots(spec, name)
    variant = variant_of(spec, length, layout)
    return replace(spec, variant=variant, positions=length or variant.positions)


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


def variant_of(spec: MotionSpec, length: int | None, layout: str) -> Variant:
    """Which published form a file with these slots, length of its tables and naming (`original`, `hotshot`) is of."""
    if not spec.attentions:
        return CONVOLUTION
    if layout == "hotshot":
        return HOTSHOT_XL
    if spec.levels == SDXL_LEVELS and not spec.has_mid:
        return SDXL_BETA
    if spec.has_mid:
        return ANIMATE_LCM if length is None and layout == "original" else V2
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
    return any(SLOT_KEY.match(key) for key in tensors)


def _is_controlnet(tensors: Mapping[str, Tensor]) -> bool:
    parts = ("controlnet_cond_embedding", "controlnet_down_blocks", "control_model.", "zero_convs.")
    return any(_any(part)(tensors) for part in parts)


def _is_domain_adapter(tensors: Mapping[str, Tensor]) -> bool:
    return bool(tensors) and all(ADAPTER_KEY.match(key) for key in tensors)


OTHER_FILES: tuple[tuple[Test, str], ...] = (
    (lambda t: not t, "holds no tensors at all. Choose a motion module, such as mm_sd_v15_v2 or v3_sd15_mm."),
    (lambda t: _is_lora(t) and _has_motion(t),
     "is a MotionLoRA, which changes a motion module but is not one. Load a motion module here and put this file "
     "into Load MotionLoRA."),
    (_is_domain_adapter, "is a LoRA for the image model, such as the domain adapter v3_sd15_adapter. Move it to "
     "models/loras and use the Load LoRA node for it."),
    (_is_lora, "is a LoRA for an image model. Move it to models/loras and use the Load LoRA node for it."),
    (lambda t: _is_controlnet(t) and not _has_motion(t),
     "is a ControlNet. Move it to models/controlnet and use the Load ControlNet Model node for it."),
    (_is_controlnet,
     "is a SparseCtrl encoder (a ControlNet for video), not a motion module. Load it with a ControlNet loader that "
     "knows SparseCtrl, and choose v3_sd15_mm here."),
    (lambda t: any(_any(part)(t) for part in ("FancyVideo", "fps_embedding.", "motion_embedding.")),
     "is a FancyVideo module, which needs its own frame-rate and motion inputs; it is not supported."),
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
    (_any(".attn_temp."), "is a network tuned on one clip (Tune-A-Video). Load it with Load Tuned Video Model."),
    (lambda t: not _has_motion(t) and (_any("down_blocks.")(t) or _any("input_blocks.")(t)),
     "is a UNet for images. Use the Load Diffusion Model node for it, and choose a motion module here."),
    (lambda t: not _has_motion(t), "holds no motion module. Choose a file such as mm_sd_v15_v2, v3_sd15_mm, "
     "mm_sdxl_v10_beta, hsxl_temporal_layers or AnimateLCM_sd15_t2v."),
)


def refuse_other_files(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise a CheckpointError that says what the file is, if it is anything but a motion module."""
    for test, sentence in OTHER_FILES:
        if test(tensors):
            raise CheckpointError(f"{name} {sentence}")
