"""Motion modules as the host's own managed models, and MotionLoRAs as weight patches of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ..motion_modules.animatediff.checkpoint import MotionFile, read_motion_module
from ..motion_modules.animatediff.lora import MotionLora, parts_for, read_motion_lora
from ..motion_modules.animatediff.network import MotionModel
from ..motion_modules.animatediff.spec import MotionSpec
from ..motion_modules.errors import TrainingError
from ..motion_modules.files import read_weights
from . import paths

OUTPUT = "proj_out.weight"
FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MotionModule:
    """What travels on a MOTION_MODULE link: a managed model, its layout and its file's name."""

    name: str
    spec: MotionSpec
    patcher: ModelPatcher

    def describe(self) -> str:
        spec, variant = self.spec, self.spec.variant
        schedule = "the image model's own noise schedule" if variant.schedule is None else (
            f"the noise schedule '{variant.schedule.value}'")  # fmt: skip
        return (f"{self.name}: {variant.name} for {spec.family}, {len(spec.slots)} modules, {spec.positions} frames, "
                f"trained with {schedule}")


def load_motion_module(name: str) -> MotionModule:
    """Load a file of the animatediff_models folder. Raises CheckpointError with a sentence for the user."""
    path = paths.locate(paths.MOTION_MODULES, name)
    module = manage(read_motion_module(read_weights(path), name), name)
    log.info(module.describe())
    return module


def manage(file: MotionFile, name: str) -> MotionModule:
    """Build the network and hand it to the host's model management."""
    tensors = list(file.weights.values())
    device = comfy.model_management.get_torch_device()
    dtype = max((tensor.dtype for tensor in tensors), key=lambda kind: kind.itemsize)  # files may mix fp8 and wider
    if dtype not in FLOAT8:
        count = sum(t.numel() for t in tensors)
        dtype = comfy.model_management.unet_dtype(device=device, model_params=count, weight_dtype=dtype)
    offload = comfy.model_management.unet_offload_device()
    network = MotionModel(file.spec, comfy.ops.manual_cast, dtype=dtype, device=offload)
    network.load_state_dict(file.weights)
    network.eval().requires_grad_(False)
    return MotionModule(name, file.spec, ModelPatcher(network, load_device=device, offload_device=offload))


def add_motion_lora(module: MotionModule, name: str, strength: float) -> MotionModule:
    """Patch a MotionLoRA of the animatediff_motion_lora folder onto a motion module, leaving the given one alone.

    Raises CheckpointError or ModelMismatchError with a sentence for the user.
    """
    path = paths.locate(paths.MOTION_LORAS, name)
    return patch_motion_lora(module, read_motion_lora(read_weights(path), name), strength)


def is_still(module: MotionModule) -> bool:
    """Whether every output projection is zero, so that no change to an attention reaches the picture, and no gradient
    the attentions. That is how a new motion module begins (AnimateDiff, arXiv 2307.04725, section 4.2)."""
    slots = module.patcher.model.transformers()
    if any(f"{slot}.temporal_transformer.{OUTPUT}" in module.patcher.patches for slot in slots):
        return False
    return not any(bool(slot.proj_out.weight.float().any()) for slot in slots.values())


def check_teachable(module: MotionModule) -> None:
    """Raise TrainingError for a motion module on which a MotionLoRA would learn nothing."""
    if not module.spec.attentions:
        raise TrainingError(f"{module.name} has convolutions over frames and no attention, which is what a MotionLoRA "
                            "changes. Choose another motion module.")  # fmt: skip
    if is_still(module):
        raise TrainingError(f"{module.name} moves nothing: its output projections are zero, as before any training, so "
                            "that a MotionLoRA on it would learn nothing. Choose a trained motion module, or train "
                            "this one first with Train Motion Module.")  # fmt: skip


def patch_motion_lora(module: MotionModule, lora: MotionLora, strength: float) -> MotionModule:
    """Patch an already read MotionLoRA onto a motion module."""
    shapes = {key: tensor.shape for key, tensor in module.patcher.model.state_dict().items()}
    parts = parts_for(lora, module.spec, shapes)
    if is_still(module) and not any(key.endswith(f".{OUTPUT}") for key in parts):
        log.warning("%s has no effect on %s: the output projections of that motion module are zero, as before any "
                    "training. Load a trained one.", lora.name, module.name)  # fmt: skip
    patcher = module.patcher.clone()
    patcher.add_patches({key: LoRAAdapter(set(), (part.up, part.down, part.alpha, None, None, None))
                         for key, part in parts.items()}, strength)
    return replace(module, patcher=patcher)
