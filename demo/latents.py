"""Drawn pictures and clips as latents, encoded once and kept in a file beside the training state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..training.checkpoint import load_weights, read_recipe, save_weights
from . import world
from .captions import Words, sentences

OPENING = 3  # frames at the beginning of a clip

Encoder = Callable[[torch.Tensor], torch.Tensor]
"""Pictures (n, h, w, 3) in [0, 1] to scaled latents (n, 4, h/8, w/8)."""


@dataclass(frozen=True)
class Samples:
    """latents (n, frames, 4, 16, 16) and the caption of each."""

    latents: torch.Tensor
    texts: list[str]


@dataclass(frozen=True)
class Order:
    """What to draw: `count` samples of `frames` frames. Stills where `frames` is 1."""

    name: str
    count: int
    frames: int = 1
    mark: bool = False
    moving: float = 1.0  # share of captions with a direction
    zoom: float = 0.0
    seed: int = 0

    def scene(self, index: int) -> tuple[Words, world.Scene]:
        """The sample of one number: its words and its frames."""
        rng = np.random.default_rng([self.seed, index])
        choices = sentences("train", moving=rng.random() < self.moving)
        words = choices[rng.integers(len(choices))]
        if self.frames == 1:
            return words, world.still(words, rng, mark=self.mark)
        return words, world.clip(words, rng, self.frames, zoom=self.zoom, mark=self.mark)


class Openings(Order):
    """Stills composed as clips begin: where a caption has a direction, the shape stands where it will set out."""

    def scene(self, index: int) -> tuple[Words, world.Scene]:
        rng = np.random.default_rng([self.seed, index])
        choices = sentences("train", moving=rng.random() < self.moving)
        words = choices[rng.integers(len(choices))]
        if words.direction is None:
            return words, world.still(words, rng, mark=self.mark)
        return words, world.clip(words, rng, mark=self.mark)[[rng.integers(OPENING)]]


def obtain(order: Order, encode: Encoder, folder: Path, stamp: str, batch: int = 64) -> Samples:
    """Draw and encode, or read what was encoded before by the same autoencoder (`stamp` names it)."""
    path = folder / f"{order.name}.safetensors"
    recipe = {"order": repr(order), "autoencoder": stamp}
    words, scenes = zip(*(order.scene(index) for index in range(order.count)), strict=True)
    texts = [w.text for w in words]
    if read_recipe(path) == recipe:
        return Samples(load_weights(path)["latents"], texts)
    per_call = max(1, batch // order.frames)
    parts = [encode(world.draw(world.join(scenes[i : i + per_call]))) for i in range(0, order.count, per_call)]
    latents = torch.cat(parts).unflatten(0, (order.count, order.frames))
    save_weights(path, {"latents": latents}, recipe)
    return Samples(latents, texts)
