"""Picture files as clips of one frame."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .clip import Clip
from .errors import VideoError
from .geometry import Frame, fit


def read_still(path: Path, name: str, frame: Frame) -> Clip:
    """A picture file as a clip of one frame, read when it is asked for. Raises VideoError where it is none."""
    height, width = frame.size(*_picture(path, name).shape[1:3])

    def chunks() -> Iterator[Tensor]:
        yield fit(_picture(path, name), frame)

    return Clip(1, height, width, Fraction(1), chunks)


def _picture(path: Path, name: str) -> Tensor:
    """Upright, without transparency: (1, h, w, 3) in 0..1."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError as error:
        raise VideoError(f"{name} is not there any more.") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{name} cannot be read as a picture ({error}). Copy or download it again.") from error
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0)[None]
