"""Cutting conditioning to the frames of a window: prompts, latents, masks, ControlNet hints, boxes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comfy.controlnet import ControlBase
from torch import Tensor


class ControlSlices:
    """ControlNets of the host cut to windows, kept for a run so that a hint is prepared once per window.

    ControlNets of other packs are left alone: they read the frames of a window from `ad_params` themselves.
    """

    def __init__(self) -> None:
        self._cut: dict[tuple, Any] = {}

    def cut(self, control: Any, indices: list[int]) -> Any:
        """A control with only the hints of these frames; the chain behind it is cut the same way."""
        if control is None or not type(control).__module__.startswith("comfy."):
            return control
        key = (id(control), tuple(indices))
        if key not in self._cut:
            self._cut[key] = (self._copy(control, indices), control)  # the original is held so its id stays its own
        return self._cut[key][0]

    def _copy(self, control: ControlBase, indices: list[int]) -> ControlBase:
        part = copy.copy(control)
        for name in ("cond_hint_original", "extra_concat_orig"):
            value = getattr(control, name, None)
            if isinstance(value, Tensor):
                setattr(part, name, _rows(value, indices))
            elif isinstance(value, list):
                setattr(part, name, [_rows(v, indices) if isinstance(v, Tensor) else v for v in value])
        part.cond_hint = None
        part.extra_concat = None
        part.previous_controlnet = self.cut(control.previous_controlnet, indices)
        return part


def cut_conds(
    conds: list[dict] | None, x: Tensor, window: Any, controls: ControlSlices, model: Any
) -> list[dict] | None:
    """The conditioning of one window. Nothing that was passed in is changed.

    x: the whole clip's latents, which tell the number of frames. model: asked first where it knows its own
    conditioning per frame (newer hosts), may be None.
    """
    if conds is None:
        return None
    return [_cut_cond(cond, x, window, controls, model) for cond in conds]


def _cut_cond(cond: dict, x: Tensor, window: Any, controls: ControlSlices, model: Any) -> dict:
    out = dict(cond)
    if window.dim == 0 and isinstance(cond.get("mask"), Tensor):
        out["mask"] = _rows(cond["mask"], window.index_list)
    if "control" in cond:
        out["control"] = controls.cut(cond["control"], window.index_list)
    if window.dim == 0 and "gligen" in cond:
        kind, network, boxes = cond["gligen"]
        if kind == "position_batched":
            boxes = [boxes[i % len(boxes)] for i in window.index_list]
        out["gligen"] = (kind, network, boxes)
    if "model_conds" in cond:
        out["model_conds"] = {
            key: _cut_value(key, value, x, window, model) for key, value in cond["model_conds"].items()
        }
    return out


def _cut_value(key: str, value: Any, x: Tensor, window: Any, model: Any) -> Any:
    resize = getattr(model, "resize_cond_for_context_window", None)
    if resize is not None and window.dim != 0:
        cut = resize(key, value, window, x, x.device)
        if cut is not None:
            return cut
    if key == "num_video_frames":
        part = value._copy_with(value.cond)
        part.cond = window.context_length
        return part
    tensor = getattr(value, "cond", None)
    if not isinstance(tensor, Tensor):
        return value
    if window.dim == 0:
        return value._copy_with(_rows(tensor, window.index_list))
    if tensor.ndim == x.ndim and tensor.shape[window.dim] == x.shape[window.dim]:
        return value._copy_with(window.get_tensor(tensor))
    return value


def _rows(tensor: Tensor, indices: list[int]) -> Tensor:
    """Rows of a batch for these frames. The host repeats a short batch over the frames, so row i stands for i mod n."""
    if tensor.ndim == 0 or tensor.shape[0] == 1:
        return tensor
    return tensor[torch.tensor([i % tensor.shape[0] for i in indices], device=tensor.device)]
