"""How consistent a video is and how well it shows a text, by the user's CLIP models."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn

from ..motion_modules.errors import ModelMismatchError, check_choice
from ..sampling.agreement import Agreement
from .video import clip_of, watch

CROPS = ["center", "none"]
PLAUSIBLE = (0.05, 20.0)  # mean length of a row of a projection that has been loaded; trained ones are near 1
NEAR_ZERO = 5.0  # below this a text and its clip have nothing to do with each other, or the encoders have not


@dataclass(frozen=True)
class Evaluation:
    """Cosines x 100 of a video's frames; NaN for what was not measured."""

    frames: int
    consistency: float
    faithfulness: float

    @property
    def report(self) -> str:
        """What the node shows."""
        lines = [f"{self.frames} frames, cosines x 100",
                 "frame consistency: " + ("needs two frames" if isnan(self.consistency) else f"{self.consistency:.2f}"),
                 "textual faithfulness: " + (f"{self.faithfulness:.2f}" if not isnan(self.faithfulness)
                                             else "not measured; connect clip and write a text")]  # fmt: skip
        if self.faithfulness < NEAR_ZERO:
            lines.append("So low a faithfulness often means that clip and clip_vision are not a pair.")
        return "\n".join(lines)


def evaluate(clip_vision: Any, video: Any, text: str, crop: str, clip: Any = None) -> Evaluation:
    """Embed every frame of an IMAGE or VIDEO, a few at a time, and compare them with each other and with the text.

    Raises ValueError and ModelMismatchError with a sentence for the user.
    """
    check_choice("crop", crop, CROPS)
    told = None
    if clip is not None and text.strip():
        told = text_embedding(clip, text, width_of(clip_vision))
    film = clip_of(video)
    agreement, on_frame = Agreement(told), watch(film)
    for pictures in film.chunks():
        embeddings = clip_vision.encode_image(pictures, crop=crop == "center")["image_embeds"]
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            raise ModelMismatchError("This CLIP_VISION gives no single vector per picture, as SigLIP models do not. "
                                     "Load a CLIP vision model: ViT-L, ViT-H or ViT-bigG.")  # fmt: skip
        agreement.add(embeddings)
        on_frame(agreement.frames)
    return Evaluation(agreement.frames, agreement.consistency, agreement.faithfulness)


def width_of(clip_vision: Any) -> int:
    """Length of the vectors that pictures and texts have in common. Raises ModelMismatchError for other models."""
    projection = getattr(clip_vision.model, "visual_projection", None)
    if not isinstance(projection, nn.Linear):
        raise ModelMismatchError("This CLIP_VISION was not trained together with a text encoder that ComfyUI loads, so "
                                 "it cannot tell how well frames show a text. Load a CLIP vision model, or disconnect "
                                 "clip to measure frame consistency alone.")  # fmt: skip
    return projection.weight.shape[0]


def text_embedding(clip: Any, text: str, width: int) -> Tensor:
    """The text in the space of the pictures (width,), by that encoder of a CLIP which was trained for this space.

    Its first 75 tokens count. Raises ModelMismatchError where the CLIP has no such encoder.
    """
    found, unloaded = [], False
    for name, tokens in clip.tokenize(text).items():
        tower = getattr(clip.cond_stage_model, f"clip_{name}", None)
        projection = getattr(getattr(tower, "transformer", None), "text_projection", None)
        if not isinstance(projection, nn.Linear):
            continue
        found.append(projection.weight.shape[0])
        if found[-1] == width and _is_loaded(projection.weight):
            return _embed(clip, tower, tokens)
        unloaded = unloaded or found[-1] == width
    if unloaded:
        raise ModelMismatchError("The file of this CLIP has no text projection (SD1.x checkpoints hold none), "
                                 "and without it text and pictures cannot be compared. Load the whole text encoder "
                                 "with Load CLIP, clip_l.safetensors for instance.")  # fmt: skip
    has = f"vectors of {' and '.join(map(str, found))}" if found else "no CLIP text encoder"
    raise ModelMismatchError(f"This CLIP has {has}, and the CLIP_VISION has vectors of {width}. Connect two that were "
                             "trained together: clip_l with ViT-L, SD2.x's encoder with ViT-H, clip_g with "
                             "ViT-bigG.")  # fmt: skip


def _is_loaded(weight: Tensor) -> bool:
    """False for a projection that was in no file: its memory holds zeros, or whatever was there before."""
    weight = weight.detach().float()
    size = float(weight.square().sum(1).sqrt().mean())
    identity = torch.equal(weight, torch.eye(*weight.shape, device=weight.device))
    return PLAUSIBLE[0] < size < PLAUSIBLE[1] and not identity


def _embed(clip: Any, tower: Any, tokens: list) -> Tensor:
    patcher = clip.load_model()
    clip.cond_stage_model.reset_clip_options()
    tower.set_clip_options({"projected_pooled": True, "execution_device": patcher.load_device})
    try:
        return tower.encode_token_weights(tokens[:1])[1][0].float().cpu()
    finally:
        clip.cond_stage_model.reset_clip_options()
