"""Settings that change from place to place, cut to what one call of a model works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..motion_modules.call import resized
from ..sampling.frame_values import FrameValues

AREAS = "latentmotion_areas"  # in transformer_options: the Areas of this evaluation


@dataclass(frozen=True, eq=False)
class Areas:
    """Where on the latent the host lets conditionings work. size: (h, w) of all of it. boxes: (h, w, y, x) by uuid."""

    size: tuple[int, int]
    boxes: dict[Any, tuple[int, int, int, int]]

    def cut(self, maps: Tensor, uuid: Any) -> Tensor:
        """Shapes: maps (n, 1, *size) -> (n, 1, h, w) of that conditioning."""
        height, width, y, x = self.boxes.get(uuid, (*self.size, 0, 0))
        return maps[..., y : y + height, x : x + width]


def areas_of(conds: Sequence[Any], x: Tensor) -> dict[str, Areas]:
    """What transformer_options must say where a conditioning of this evaluation has an area of its own."""
    every = [cond for group in conds for cond in group or ()]
    boxes = {cond["uuid"]: tuple(cond["area"]) for cond in every if len(cond.get("area") or ()) == 4}
    return {AREAS: Areas(tuple(x.shape[-2:]), boxes)} if boxes else {}


def values_on(values: FrameValues, frames: Sequence[int], x: Tensor, options: dict) -> float | Tensor:
    """The values for one call: a number, or one map for each of its images.

    Shapes: frames of one conditioning's clip, x (n, c, h, w) -> (n, 1, h, w), or (n, 1, 1, 1).
    """
    count = len(options.get("cond_or_uncond", (0,))) or 1
    maps = values.at(frames, max(1, x.shape[0] // len(frames) // count))
    if not isinstance(maps, Tensor):
        return maps
    areas = options.get(AREAS) or Areas(tuple(x.shape[-2:]), {})
    if maps.shape[-2:] == (1, 1):
        return maps.to(x.device).repeat(count, 1, 1, 1)
    maps = resized(maps.to(x.device), areas.size)
    return torch.cat([areas.cut(maps, uuid) for uuid in options.get("uuids") or [None] * count])
