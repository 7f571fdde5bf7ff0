"""Cutting conditioning to the frames of a window: prompts, latents, masks, ControlNet hints, boxes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from comfy.controlnet import ControlBase
from torch import Tensor

HINTS = ("cond_hint_original", "extra_concat_orig")
MOST_KEPT = 256 * 2**20  # bytes of hints
BESIDE = ("time_dim_concat", "reference_latent", "reference_motion")  # frames beside the clip's, for every window
SETS = "vace_context"  # Wan VACE's sets of control latents, (clips, sets, c, frames, h, w)


class Along(NamedTuple):
    """A condition with `each` entries on `axis` for a frame of the latents; the first `late` frames have none."""

    axis: int
    each: int = 1
    late: int = 0

    def entries(self, tensor: Tensor, window: Any, frames: int) -> list[int] | None:
        """Those of the window's frames, None where the tensor is not of such a clip.

        The network gives the first `late` frames of a window none, whichever frames they are.
        """
        most = (frames - self.late) * self.each
        if tensor.ndim <= self.axis or not most - self.each < tensor.shape[self.axis] <= most:
            return None
        behind = [max(i - self.late, 0) for i in window.index_list[self.late :]]
        every = [i * self.each + k for i in behind for k in range(self.each)]
        return [i for i in every if i < tensor.shape[self.axis]] or None


ALONG = {
    "audio_embed": (Along(1), Along(3, each=4)),  # HuMo, S2V
    "pose_latents": (Along(2, late=1),),  # Animate, whose first frame is the reference
    "face_pixel_values": (Along(2, each=4, late=1),),
}
"""Conditions of Wan's models that are not as long as the latents. Newer hosts know most of them themselves."""
FADE = 8  # latent pixels and frames: the host's, at the sides of an area


class ControlSlices:
    """ControlNets of the host cut to windows, kept for a run so that a hint is prepared once per window.

    What is kept has a limit, or a long clip's hints would be there several times over, prepared ones on the device;
    windows beyond it are cut anew at every step. Within one window a control is always cut to the same object, for the
    host puts prompts into one batch only if they share it. ControlNets of other packs are left alone: they read the
    frames of a window from `ad_params` themselves.
    """

    def __init__(self) -> None:
        self.kept_bytes = 0
        self._kept: dict[tuple, Any] = {}
        self._window: tuple[int, ...] = ()
        self._now: dict[tuple, Any] = {}

    def cut(self, control: Any, indices: list[int]) -> Any:
        """A control with only the hints of these frames; the chain behind it is cut the same way."""
        if control is None or is_foreign(control):
            return control
        window = tuple(indices)
        if window != self._window:
            self._window, self._now = window, {}
        key = (id(control), window)
        found = self._kept.get(key) or self._now.get(key)
        if found is None:
            found = (self._copy(control, indices), control)  # the original is held so its id stays its own
            size = sum(hint.nbytes for hint in _hints(found[0]))
            fits = self.kept_bytes + size <= MOST_KEPT
            (self._kept if fits else self._now)[key] = found
            self.kept_bytes += size if fits else 0
        return found[0]

    def _copy(self, control: ControlBase, indices: list[int]) -> ControlBase:
        part = copy.copy(control)
        for name in HINTS:
            value = getattr(control, name, None)
            if isinstance(value, Tensor):
                setattr(part, name, _rows(value, indices))
            elif isinstance(value, list):
                setattr(part, name, [_rows(v, indices) if isinstance(v, Tensor) else v for v in value])
        part.cond_hint = None
        part.extra_concat = None
        part.previous_controlnet = self.cut(control.previous_controlnet, indices)
        return part


def is_foreign(control: Any) -> bool:
    """Whether a ControlNet is another pack's."""
    return not type(control).__module__.startswith("comfy.")


def has_foreign_control(conds: list[dict] | None) -> bool:
    controls = [cond["control"] for cond in conds or () if cond.get("control") is not None]
    while controls:
        control = controls.pop()
        if is_foreign(control):
            return True
        controls += [behind for behind in (control.previous_controlnet,) if behind is not None]
    return False


def _hints(control: ControlBase) -> list[Tensor]:
    values = [getattr(control, name, None) for name in HINTS]
    flat = [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]
    return [tensor for tensor in flat if isinstance(tensor, Tensor)]


def cut_conds(
    conds: list[dict] | None, x: Tensor, window: Any, controls: ControlSlices, model: Any
) -> list[dict] | None:
    """The conditioning of one window. Nothing that was passed in is changed.

    x: the whole clip's latents, which tell the number of frames. model: asked first where it knows its own
    conditioning per frame (newer hosts), may be None.
    """
    if conds is None:
        return None
    parts = [part for cond in conds for part in _cut_area(cond, x, window)]
    return [_cut_cond(part, x, window, controls, model) for part in parts]


def _cut_area(cond: dict, x: Tensor, window: Any) -> list[dict]:
    """A prompt whose area is some frames of 5-D latents, with the part of the area that is in the window.

    None where the window has no frame of it, two where a window over the seam of a loop meets both of its ends. Areas
    are in the host's form for sampling, latent (frames, height, width) and where each of them begins.
    """
    area = cond.get("area")
    if window.dim == 0 or area is None or len(area) < 6 or (area[3] == 0 and area[0] >= x.shape[2]):
        return [cond]  # all frames of a window are in it, too
    size, begin = area[:3], area[3:]
    places = [i for i, frame in enumerate(window.index_list) if begin[0] <= frame < begin[0] + size[0]]
    if "mask" not in cond:
        cond = cond | {"mask": _fade(x, size, begin)}
    starts = [i for i in places if i - 1 not in places]
    ends = [i + 1 for i in places if i + 1 not in places]
    return [
        cond | {"area": (end - start, *size[1:], start, *begin[1:])} for start, end in zip(starts, ends, strict=True)
    ]


def _fade(x: Tensor, size: Sequence[int], begin: Sequence[int]) -> Tensor:
    """The weights that the host gives an area of a whole clip: they fall towards each side that is not the clip's.

    In the host's form for masks, (1, frames, h, w). An area with a mask gets no others.
    """
    mask = x.new_ones(1, *x.shape[2:])
    for axis, (count, first) in enumerate(zip(size, begin, strict=True), 1):
        whole = mask.shape[axis]
        count = min(count, whole - first)
        depth = min(FADE, count // 4)
        for i in range(depth):
            if first:
                mask.narrow(axis, first + i, 1).mul_((i + 1) / depth)
            if first + count < whole:
                mask.narrow(axis, first + count - 1 - i, 1).mul_((i + 1) / depth)
    return mask


def _cut_cond(cond: dict, x: Tensor, window: Any, controls: ControlSlices, model: Any) -> dict:
    out = dict(cond)
    if isinstance(cond.get("mask"), Tensor):
        out["mask"] = _cut_mask(cond["mask"], x, window)
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


def _cut_mask(mask: Tensor, x: Tensor, window: Any) -> Tensor:
    """A mask in the host's form for sampling: the shape of the latents without their channels.

    For images that is (frames, h, w). For 5-D latents it is (1, frames, h, w), or one such mask for each clip; with a
    single frame it holds for the whole clip.
    """
    if window.dim == 0:
        return _rows(mask, window.index_list)
    axis = window.dim - 1
    if mask.ndim == x.ndim - 1 and mask.shape[axis] == x.shape[window.dim]:
        return window.get_tensor(mask, dim=axis)
    return mask


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
    for along in ALONG.get(key, ()):
        places = along.entries(tensor, window, x.shape[window.dim])
        if places is not None:
            return value._copy_with(tensor.index_select(along.axis, torch.tensor(places, device=tensor.device)))
    axis = window.dim + (key == SETS)
    fits = tensor.ndim == x.ndim + (key == SETS) and tensor.shape[axis] == x.shape[window.dim]
    return value._copy_with(window.get_tensor(tensor, dim=axis)) if fits and key not in BESIDE else value


def _rows(tensor: Tensor, indices: list[int]) -> Tensor:
    """Rows of a batch for these frames. The host repeats a short batch over the frames, so row i stands for i mod n."""
    if tensor.ndim == 0 or tensor.shape[0] == 1:
        return tensor
    return tensor[torch.tensor([i % tensor.shape[0] for i in indices], device=tensor.device)]
