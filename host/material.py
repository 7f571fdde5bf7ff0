"""What a training learns from: told apart from others before anything is encoded, then as latents and CONDITIONING."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..media.clip import Clip
from ..motion_modules.errors import ModelMismatchError
from ..training.clips import EMPTY, Clips
from ..training.dataset import Dataset
from ..training.likeness import Likeness
from .dataset import Shelf, as_latents
from .encode import encode_frames


@dataclass(frozen=True, eq=False)
class Material:
    """Films that are not decoded yet, and what reads them.

    contexts: CONDITIONING of every caption and of the empty one. stamp: of the VAE. shelf: where latents are kept
    until the training is finished. frames, stride, drop: see `Clips`.
    """

    dataset: Dataset
    contexts: dict[str, list]
    encode: Callable[[Clip], Tensor]
    stamp: str
    shelf: Shelf
    frames: int
    stride: int
    drop: float = 0.1

    def told(self) -> str:
        """A short text that is another where captions, cuts, the VAE or files differ. Raises TrainingError where
        nothing can be cut from the films."""
        pieces = [(piece.start, piece.frames, piece.caption, piece.film.mark and (piece.film.name, piece.film.mark))
                  for piece in self.dataset.usable(self.frames, self.stride)]  # fmt: skip
        cuts = (pieces, self.frames, self.stride, self.drop, self.stamp)
        return hashlib.sha256(repr(cuts).encode()).hexdigest()[:16]

    def likeness(self) -> tuple[float, ...]:
        """Numbers that hardly change with rounding: of the pictures that are in no file, and of what the captions are
        to the MODEL."""
        pictures, words = Likeness(), Likeness()
        for film in self.dataset.films:
            for chunk in () if film.mark else film.clip.chunks():
                pictures.add(chunk)
        for conditioning in self.contexts.values():
            for tokens, more in conditioning:
                words.add(tokens)
                if more.get("pooled_output") is not None:
                    words.add(more["pooled_output"])
        return pictures.numbers() + words.numbers()

    def clips(self) -> Clips:
        """Every film encoded once."""
        return as_latents(self.dataset, self.frames, self.stride, self.encode, self.shelf, self.drop)


def material(model: ModelPatcher, clip: Any, vae: Any, dataset: Dataset, how: Any, drop: float = 0.1,
             stride: int | None = None) -> Material:  # fmt: skip
    """What a run of `how` (a Training) learns from. stride: another than that of the run.

    Raises ModelMismatchError where VAE or text encoder are none, or none of the MODEL's, TrainingError where clips are
    short.
    """
    check_readers(clip, vae)
    check_vae(model, vae)
    stride = how.stride if stride is None else stride
    taken = dataset.usable(how.frames, stride)
    contexts = encode_texts(clip, [*dict.fromkeys(piece.caption for piece in taken), EMPTY])
    check_contexts(model, contexts)
    network = getattr(vae, "first_stage_model", None)
    stamp = fingerprint(network) if network else ""
    return Material(dataset, contexts, partial(encode_pictures, model, vae), stamp, Shelf(how.latents, stamp),
                    how.frames, stride, drop)  # fmt: skip


def check_readers(clip: Any, vae: Any) -> None:
    """Raise ModelMismatchError where CLIP or VAE are none, as Load Checkpoint gives them of files without."""
    if clip is None:
        raise ModelMismatchError("There is no text encoder in this CLIP: the checkpoint it comes from has none. "
                                 "Connect Load CLIP with the file of one that belongs to the MODEL.")  # fmt: skip
    if getattr(vae, "first_stage_model", vae) is None:
        raise ModelMismatchError("There is no network in this VAE: the checkpoint it comes from has none. Connect Load "
                                 "VAE with the file of one that belongs to the MODEL.")  # fmt: skip


def check_vae(model: ModelPatcher, vae: Any) -> None:
    """Raise ModelMismatchError where the VAE makes latents of other channels than the MODEL takes."""
    wanted = model.get_model_object("latent_format").latent_channels
    made = getattr(vae, "latent_channels", wanted)
    if made != wanted:
        raise ModelMismatchError(f"The VAE makes latents of {made} channels, and this MODEL takes {wanted}. Connect "
                                 "the VAE that belongs to the MODEL.")  # fmt: skip


def check_contexts(model: ModelPatcher, contexts: dict[str, list]) -> None:
    """Raise ModelMismatchError where the text encoder's numbers are not as many as the MODEL reads."""
    wanted = model.model.model_config.unet_config.get("context_dim")
    for conditioning in contexts.values():
        for tokens, _ in conditioning:
            if wanted is not None and tokens.shape[-1] != wanted:
                raise ModelMismatchError(f"The text encoder gives {tokens.shape[-1]} numbers a token, and this MODEL "
                                         f"reads {wanted}. Connect the CLIP that belongs to the MODEL.")  # fmt: skip


def encode_pictures(model: ModelPatcher, vae: Any, film: Clip) -> Tensor:
    """Every picture as the model's network sees it. Shapes: -> (frames, c, h/8, w/8), float32 on the CPU."""
    latents = model.model.process_latent_in(encode_frames(vae, film))
    with torch.inference_mode(False):
        return latents.float().clone()


def encode_texts(clip: Any, texts: list[str]) -> dict[str, list]:
    """CONDITIONING of every text, each encoded once."""
    return {text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts}


def fingerprint(network: nn.Module) -> str:
    """A short text that differs between networks: of their tensors' names and first numbers."""
    digest = hashlib.sha256()
    for name, tensor in network.named_parameters():
        digest.update(name.encode())
        digest.update(tensor.flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
