"""Reading weight files: safetensors first, pickles only where nothing in them can run code."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

CONVERT = ("Convert it once on a machine you trust: load it there with torch.load, keep only the tensors and write "
           "them with safetensors.torch.save_file.")
ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"
AGAIN = "It is probably cut short or damaged: compare its size with the original and download it again."
# What torch.load raises, apart from UnpicklingError, for files cut or changed at any place.
DAMAGE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
          ArithmeticError, struct.error)


def read_weights(path: Path) -> dict[str, Any]:
    """Everything in a weight file, on the CPU. Raises CheckpointError with a sentence naming the file.

    The format is told by the content, as files are often renamed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name} does not exist any more. Refresh the page and choose another file.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
        _refuse_text(head, path.name)
        return _read_safetensors(path) if _is_safetensors(head, path) else _read_pickle(path)
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be read as safetensors ({error}). {AGAIN}") from error
    except (pickle.UnpicklingError, *DAMAGE) as error:
        raise CheckpointError(f"{path.name} {_pickle_fault(error, head)}") from error


def _pickle_fault(error: Exception, head: bytes) -> str:
    if not head.startswith((ZIP_START, PICKLE_START)):
        return f"is not a file of weights. {AGAIN}"
    if isinstance(error, pickle.UnpicklingError) and "truncated" not in str(error):
        return f"is a pickle that holds more than tensors, so it is not opened. {CONVERT}"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot be read ({first_line}). {AGAIN}"


def _refuse_text(head: bytes, name: str) -> None:
    """Empty files, saved web pages and Git LFS placeholders are what a failed download leaves behind."""
    if not head:
        raise CheckpointError(f"{name} is empty. Download it again.")
    text = head.lstrip()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{name} is a Git LFS placeholder of a few lines, not the weights themselves. Run "
                              "`git lfs pull` where it came from, or download the file by itself.")
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{name} is a web page, not weights: the download was answered with a page. Open the "
                              "address in a browser, sign in if it asks for it, and download the file again.")


def _is_safetensors(head: bytes, path: Path) -> bool:
    if head[8:9] == b"{":
        return True
    return path.suffix in (".safetensors", ".sft") and not head.startswith((ZIP_START, PICKLE_START))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def _read_pickle(path: Path) -> dict[str, Any]:
    payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path.name} holds a {type(payload).__name__} where named tensors are needed. {CONVERT}")
    return dict(payload)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for pickles. Raises CheckpointError for a damaged header."""
    with path.open("rb") as file:
        if not _is_safetensors(file.read(64), path):
            return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be read as safetensors ({error}). {AGAIN}") from error


def read_outline(path: Path) -> dict[str, Tensor]:
    """Names and shapes in a safetensors file, as tensors without storage; its weights are not read.

    Raises CheckpointError when the header is damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise CheckpointError(f"{path.name} is cut short: its header is longer than the file.")
            entries = {key: entry for key, entry in json.loads(file.read(size)).items() if key != "__metadata__"}
        return {key: torch.empty(entry["shape"], device="meta") for key, entry in entries.items()}
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{path.name} has no readable safetensors header.") from error
