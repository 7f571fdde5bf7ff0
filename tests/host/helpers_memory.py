"""What is alive in this process, and how much memory it has: for tests that nothing stays behind."""

from __future__ import annotations

import gc

import comfy.model_management
import psutil
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from latentmotion.host.unet import MotionSlot
from latentmotion.motion_modules.animatediff.network import MotionModel
from torch import Tensor

COUNTED = (Tensor, ModelPatcher, UNetModel, MotionModel, MotionSlot)
MOST_GROWTH = 50 * 1024**2  # bytes by which an allocator may differ over many runs; a model of the tests has 40 MB


def bytes_alive() -> int:
    """Bytes of every tensor that Python can reach, storages counted once; a compiler's stand-ins hold none."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def level() -> dict[str, int]:
    """What is alive once the host has unloaded its models: bytes of tensors, and objects of the kinds a run makes."""
    comfy.model_management.unload_all_models()
    counts = {"bytes": bytes_alive()}
    found = gc.get_objects()
    return counts | {kind.__name__: sum(isinstance(item, kind) for item in found) for kind in COUNTED}


def resident_bytes() -> int:
    """Memory this process has at this moment, not the most it ever had."""
    gc.collect()
    return psutil.Process().memory_info().rss
