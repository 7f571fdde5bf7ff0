"""The one place that decides how large a piece of work may be."""

from __future__ import annotations

import comfy.model_management
import torch

from ..motion_modules.call import SLAB_BYTES_CPU, SLAB_BYTES_GPU


def slab_bytes(device: torch.device) -> int:
    """Ceiling on one temporary of a motion module: what stays in a CPU's cache, or keeps a GPU busy.

    It depends on the kind of device only, never on free memory, so that a seed gives the same clip every time.
    """
    return SLAB_BYTES_CPU if device.type == "cpu" else SLAB_BYTES_GPU


def park(frames: torch.Tensor, reserve: int) -> torch.Tensor:
    """Put frames away until they are needed again: where they are while `reserve` bytes stay free, else in RAM.

    Where they lie changes no value, so free memory may decide it.
    """
    if frames.device.type == "cpu" or comfy.model_management.get_free_memory(frames.device) > reserve + frames.nbytes:
        return frames
    return frames.to("cpu")
