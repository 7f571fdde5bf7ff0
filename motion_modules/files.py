"""Reading weight files: safetensors first, pickles only where nothing in them can run code."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

CONVERT = ("Convert it once on a machine you trust: load it there with torch.load, keep only the tensors and write "
           "them with safetensors.torch.save_file.")


def read_weights(path: Path) -> dict[str, Any]:
    """Everything in a weight file, on the CPU. Raises CheckpointError with a sentence naming the file."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} does not exist any more. Refresh the page and choose another file.")
    try:
        return _read_safetensors(path) if path.suffix in (".safetensors", ".sft") else _read_pickle(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be read as safetensors ({error}). It is probably cut short: "
                              "compare its size with the original and download it again.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path.name} is a pickle that holds more than tensors, so it is not opened. "
                              f"{CONVERT}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error}). It is probably cut short: compare its size "
                              "with the original and download it again.") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def _read_pickle(path: Path) -> dict[str, Any]:
    payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path.name} holds a {type(payload).__name__} where named tensors are needed. {CONVERT}")
    return dict(payload)


def read_outline(path: Path) -> dict[str, Tensor]:
    """Names and shapes in a safetensors file, as tensors without storage; its weights are not read.

    Raises CheckpointError when the header is damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise CheckpointError(f"{path.name} is cut short: its header is longer than the file.")
            header = json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} has no readable safetensors header.") from error
    return {key: torch.empty(entry["shape"], device="meta") for key, entry in header.items() if key != "__metadata__"}
