"""Weights on disk: safetensors with the recipe in the metadata, written beside and renamed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..motion_modules.errors import TrainingError
from ..motion_modules.files import DAMAGE

ANEW = "Delete it, or set existing to 'start over', to train anew."


@contextmanager
def whole(path: Path, otherwise: str) -> Iterator[None]:
    """Reading a file: raises TrainingError with what to do otherwise where that cannot be done."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, *DAMAGE) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise TrainingError(f"{path} cannot be read ({why}). It is probably cut short or damaged. {otherwise}"
                            ) from error  # fmt: skip


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
        beside.unlink(missing_ok=True)  # a killed run's
        beside.touch()
        mode = beside.stat().st_mode  # as the user's other files are; the library makes its own for the owner alone
        save_file(tensors, beside, metadata={**(about or {}), "recipe": json.dumps(recipe, sort_keys=True)})
        beside.chmod(mode)
        os.replace(beside, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, as float32. Raises TrainingError for a damaged one."""
    with whole(path, "Delete it and make it again, or take it from where it came from."):
        return {name: tensor.float() for name, tensor in load_file(path).items()}


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe a file was made by, or None if it says nothing or is not there.

    Raises TrainingError for a damaged one.
    """
    if not path.is_file():
        return None
    with whole(path, ANEW):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("recipe")
        return dict(json.loads(text)) if text else None


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
    """The recipe of an interrupted run, or None where there is none. The rest of its state stays on the disk.

    Raises TrainingError for a damaged one.
    """
    if not path.is_file():
        return None
    with whole(path, ANEW):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["recipe"])


def load_state(path: Path) -> dict[str, Any] | None:
    """The state of an interrupted run, with its recipe under `recipe`, or None where there is none.

    Raises TrainingError for a damaged one.
    """
    if not path.is_file():
        return None
    with whole(path, ANEW):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "recipe": dict(state["recipe"])}
