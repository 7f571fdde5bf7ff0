"""Weights on disk: safetensors with the recipe in the metadata, written beside and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..motion_modules.errors import TrainingError


def save_weights(
    path: Path,
    weights: dict[str, torch.Tensor],
    recipe: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    about: dict[str, str] | None = None,
) -> None:
    """Write `weights` as `dtype`, with `recipe` (anything JSON can hold) under the metadata key `recipe`.

    about: further metadata. Raises OSError where the file cannot be written whole; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, beside, metadata={**(about or {}), "recipe": json.dumps(recipe, sort_keys=True)})
        os.replace(beside, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


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
    """Write what a training run needs to go on after an interruption. Raises TrainingError where it cannot be kept."""
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"The state of the training could not be written to {path} ({error}). Make room on that disk; training "
            "then goes on from the state that was written before, if there is one."
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def read_state_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe of an interrupted run, or None where there is none. The rest of its state stays on the disk."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["recipe"] if path.is_file() else None


def load_state(path: Path) -> dict[str, Any] | None:
    """The state of an interrupted run, with its recipe under `recipe`, or None where there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
