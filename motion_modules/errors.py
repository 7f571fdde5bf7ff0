"""Errors whose text is meant for the person at the canvas: what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable


class LatentMotionError(ValueError):
    """Base of every error the pack raises for something the user can mend."""


class CheckpointError(LatentMotionError):
    """A file is not what the node needs, or is damaged."""


class ModelMismatchError(LatentMotionError):
    """Two well-formed things do not fit each other, such as an SDXL motion module on an SD1.5 model."""


class ClipError(LatentMotionError):
    """The clip handed to a video model has an impossible number of frames."""


class TrainingError(LatentMotionError):
    """A training run cannot begin, go on or be kept."""


def check_choice(name: str, choice: str, known: Iterable[str]) -> None:
    """Raise ValueError for a widget's choice that does not exist; some hosts do not check those of V3 nodes."""
    known = list(known)
    if choice not in known:
        raise ValueError(f"{name} is '{choice}', which is not one of its choices: {', '.join(known)}.")
