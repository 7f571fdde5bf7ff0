"""Weights on disk: safetensors with the recipe in the metadata, written beside and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def save_weights(path: Path, weights: dict[str, torch.Tensor], recipe: dict[str, Any], dtype=torch.float16) -> None:
    """Write `weights` as `dtype`, with `recipe` (anything JSON can hold) under the metadata key `recipe`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    save_file(tensors, beside, metadata={"recipe": json.dumps(recipe, sort_keys=True)})
    os.replace(beside, path)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, as float32."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe a file was made by, or None if it says nothing or is not there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("recipe")
    return json.loads(text) if text else None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write what a training run needs to go on after an interruption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    os.replace(beside, path)


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an interrupted run of the same recipe, or None."""
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state if state["recipe"] == recipe else None
