"""Prompts that change from frame to frame, on any MODEL.

The CONDITIONING holds one ordinary entry per different prompt, so it does not grow with the clip, and what other nodes
do to a CONDITIONING (areas, masks, ControlNets, hooks) they do to each. A hook, which the host offers to conditioning,
brings `blend_call` into the sampling run: it puts one entry in place of those of a travel, with the embeddings of the
frames in the call, be that a clip or a window of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.conds import CONDConstant
from comfy.hooks import HookGroup, TransformerOptionsHook, set_hooks_for_conditioning
from comfy.patcher_extension import WrappersMP
from node_helpers import conditioning_set_values
from torch import Tensor

from ..sampling.travel import Interpolation, Travel, TravelError, parse_travel
from .context import frame_axis
from .inflate import KEY as MOTION
from .inflate import window_indices

KEY = "latentmotion_travel"
INTERPOLATIONS = [kind.value for kind in Interpolation]
MOST_REPEATS = 4  # of a short prompt's tokens, as the host draws the line where it batches prompts


@dataclass(frozen=True)
class Stop:
    """Which prompt of a travel an entry of a CONDITIONING is."""

    travel: Travel
    number: int


def read_travel(prompts: str, interpolation: str, text_before: str = "", text_after: str = "") -> Travel:
    """The travel that the widgets describe. Raises TravelError, naming the line."""
    return parse_travel(prompts, Interpolation(interpolation), text_before, text_after)


def known_lines(prompts: str | None) -> bool | str:
    """True, or the sentence for the first line that cannot be read; None comes over a link and is not known yet."""
    try:
        return prompts is None or bool(parse_travel(prompts))
    except TravelError as error:
        return str(error)


def encode_travel(clip: Any, travel: Travel) -> list:
    """CONDITIONING with every prompt of the travel, each encoded once.

    Raises TravelError where the CLIP is None, as loaders return it for files without a text encoder.
    """
    if clip is None:
        raise TravelError(
            "There is no CLIP: the checkpoint it comes from has no text encoder. Connect a Load CLIP node."
        )
    hook = TransformerOptionsHook({"wrappers": {WrappersMP.CALC_COND_BATCH: {KEY: [blend_call]}}})
    hook.hook_id = KEY
    hooks, combined, found = HookGroup(), {}, []
    hooks.add(hook)
    for number, text in enumerate(travel.prompts):
        entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        if len(travel.prompts) == 1:
            return entries
        entries = set_hooks_for_conditioning(entries, hooks, cache=combined)
        # Among what the model is given, since the host copies all the rest of an entry to negatives in an area.
        found += conditioning_set_values(entries, {"model_conds": {KEY: CONDConstant(Stop(travel, number))}})
    return found


def blend_call(
    executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict, *args: Any, **kw: Any
) -> Any:
    """Wraps the host's evaluation of all conditioning, once per window: travels become one entry with a row per frame.

    x: the latents of the call. Video latents have one prompt for all frames: the mean over those of the call.
    """
    indices = window_indices(model_options.get("transformer_options", {}))
    if frame_axis(x) == 0:
        frames = (model.current_patcher.get_attachment(MOTION) or {}).get("frames")
        rows = indices or list(range(frames or x.shape[0]))
    else:
        rows = indices or list(range(x.shape[frame_axis(x)]))
    conds = [None if cond is None else _blended(cond, rows, frame_axis(x) != 0, conds) for cond in conds]
    return executor(model, conds, x, timestep, model_options, *args, **kw)


def _blended(cond: list[dict], frames: list[int], together: bool, conds: list) -> list[dict]:
    """A list of entries with each travel's replaced by one. A travel may be in it several times, in areas for one."""
    groups: dict[Any, dict[int, dict]] = {}
    seen: Counter[Stop] = Counter()
    for place, entry in enumerate(cond):
        marker = entry["model_conds"].get(KEY)
        entry = {**entry, "hooks": _other_hooks(entry.get("hooks"), conds)}
        if marker is None:
            groups[place] = {0: entry}
            continue
        groups.setdefault((marker.cond.travel, seen[marker.cond]), {})[marker.cond.number] = entry
        seen[marker.cond] += 1
    _fill_in(groups)
    return [
        group[0] if isinstance(key, int) else _one_entry(group, key[0], frames, together)
        for key, group in groups.items()
    ]


def _fill_in(groups: dict[Any, dict[int, dict]]) -> None:
    """Where the host copied one prompt of a travel into an area that the opposite prompt has, with the others'.

    It does so where the area has no prompt; an entry of a group is then the first of another one, in that area.
    """
    whole = {key[0]: group for key, group in groups.items()
             if not isinstance(key, int) and len(group) == len(key[0].prompts)}  # fmt: skip
    for key, group in groups.items():
        if not isinstance(key, int) and key[0] in whole:
            copy = next(iter(group.values()))
            for number, entry in whole[key[0]].items():
                group.setdefault(number, {**copy, "model_conds": entry["model_conds"]})


def _one_entry(group: dict[int, dict], travel: Travel, frames: list[int], together: bool) -> dict:
    if len(group) < len(travel.prompts):
        raise TravelError(
            f"Only {len(group)} of the {len(travel.prompts)} prompts of a Prompt Travel arrived at the model, so some "
            "node chooses among them. Turn off split_conds_to_windows on the Context Windows node, or the like; Prompt "
            "Travel gives each window its own prompts by itself."
        )
    weights = travel.weights(frames)
    if together:
        weights = weights.mean(0, keepdim=True)
    elif bool((weights == weights[0]).all()):
        weights = weights[:1]
    active = [number for number in range(len(travel.prompts)) if bool(weights[:, number].any())]
    active.sort(key=lambda number: -float(weights[:, number].sum()))
    parts = [(_without_marker(group[number]["model_conds"]), weights[:, number]) for number in active]
    return {**group[0], "model_conds": _blend_model_conds(parts)}


def _without_marker(model_conds: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_conds.items() if key != KEY}


def _other_hooks(hooks: HookGroup | None, conds: list) -> HookGroup | None:
    """The group without our hook, so that the host puts the prompt into one batch with those that have the same."""
    rest = {hook for hook in (hooks.hooks if hooks is not None else ()) if hook.hook_id != KEY}
    if not rest:
        return None
    if len(rest) == len(hooks.hooks):
        return hooks
    known = (entry.get("hooks") for cond in conds if cond is not None for entry in cond)
    return next((group for group in known if group is not None and set(group.hooks) == rest), hooks)


def _blend_model_conds(parts: list[tuple[dict[str, Any], Tensor]]) -> dict[str, Any]:
    """What the model is given, from (the same for one prompt, its share per row (f,)), the largest share first.

    Embeddings of one row are mixed row by row; whatever else differs is taken from the largest share.
    """
    first = parts[0][0]
    if len(parts) == 1:
        return first
    return {
        key: _blend_value([model_conds[key] for model_conds, _ in parts], [shares for _, shares in parts])
        if all(key in model_conds for model_conds, _ in parts)
        else value
        for key, value in first.items()
    }


def _blend_value(values: list[Any], shares: list[Tensor]) -> Any:
    tensors = [getattr(value, "cond", None) for value in values]
    first = tensors[0]
    if not all(isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1 and t.shape[0] == 1 for t in tensors):
        return values[0]
    if all(t is first or torch.equal(t, first) for t in tensors):
        return values[0]
    rows = [share.to(first).view(-1, *(1,) * (first.ndim - 1)) for share in shares]
    # Not as one matrix product: a share of 1 beside shares of 0 must give the prompt itself, bit for bit.
    return values[0]._copy_with(sum(row * t for row, t in zip(rows, _equally_long(tensors), strict=True)))


def _equally_long(tensors: list[Tensor]) -> list[Tensor]:
    """Prompts (1, tokens, c) made equally long: repeated, which cross attention does not notice, or filled with zeros
    where that would repeat them too often, as text encoders without a fixed length do."""
    if len({t.shape for t in tensors}) == 1:
        return tensors
    if len({(t.ndim, *t.shape[2:]) for t in tensors}) > 1 or tensors[0].ndim < 3:
        raise TravelError("The prompts of Prompt Travel give this MODEL conditioning of different shapes, "
                          f"{', '.join(str(tuple(t.shape)) for t in tensors)}, which cannot be mixed. Write "
                          "prompts of about the same length.")  # fmt: skip
    lengths = [t.shape[1] for t in tensors]
    tokens = math.lcm(*lengths)
    if tokens <= MOST_REPEATS * min(lengths):
        return [t.repeat(1, tokens // t.shape[1], 1) for t in tensors]
    return [torch.nn.functional.pad(t, (0, 0, 0, max(lengths) - t.shape[1])) for t in tensors]
