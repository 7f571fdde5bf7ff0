"""Clips as pictures: one animated WebP, or a folder of PNG files. Pillow writes them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, features
from torch import Tensor

from . import metadata as meta
from .clip import Clip
from .errors import VideoError
from .formats import webp_quality

LONGEST_SIDE_OF_WEBP = 16383
EFFORT_OF_WEBP, EFFORT_OF_PNG = 4, 4


class _Later:
    """The pictures after the first as one moving picture, made as Pillow asks for them."""

    def __init__(self, pictures: Iterator[Image.Image], count: int) -> None:
        self.n_frames = count
        self._pictures = pictures

    def seek(self, index: int) -> None:
        self._shown = next(self._pictures)

    def __getattr__(self, name: str) -> Any:
        if name == "_shown":
            raise AttributeError(name)
        return getattr(self._shown, name)


def write_webp(frames: Iterator[Tensor], clip: Clip, path: Path, quality: int, metadata: dict[str, Any]) -> None:
    """Write an animated WebP that repeats for ever; quality 100 is lossless. The compressed file is held in memory.

    Shapes: frames (h, w, 3) uint8. Units: quality 0..100, as for every format.
    """
    if not features.check("webp"):
        raise VideoError("This ComfyUI cannot write WebP: its Pillow was built without it. Choose another format.")
    if max(clip.height, clip.width) > LONGEST_SIDE_OF_WEBP:
        raise VideoError(
            f"A WebP has at most {LONGEST_SIDE_OF_WEBP} pixels a side, and the video is "
            f"{clip.width} x {clip.height}. Choose another format, or make it smaller."
        )
    images = (Image.fromarray(frame.numpy()) for frame in frames)
    first = next(images)
    with path.open("wb") as file:
        first.save(file, format="WEBP", save_all=True, append_images=[_Later(images, clip.frames - 1)],
                   duration=_milliseconds(clip.frames, clip.frame_rate), loop=0, quality=webp_quality(quality),
                   lossless=quality == 100, method=EFFORT_OF_WEBP, exif=meta.exif(metadata))  # fmt: skip
    next(images, None)  # lets the source report its last picture


def _milliseconds(frames: int, rate: Fraction) -> list[int]:
    """How long each picture stays, in whole milliseconds that do not drift from the rate."""
    ends = [round(1000 * i / rate) for i in range(frames + 1)]
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def write_pngs(frames: Iterator[Tensor], folder: Path, name: str, metadata: dict[str, Any]) -> None:
    """Write `name_00000.png` and so on into a new folder; every file holds the metadata.

    Shapes: frames (h, w, 3) uint8.
    """
    folder.mkdir()
    texts = meta.png_texts(metadata)
    for number, frame in enumerate(frames):
        path = folder / f"{name.rstrip('_')}_{number:05}.png"
        Image.fromarray(frame.numpy()).save(path, compress_level=EFFORT_OF_PNG, pnginfo=texts)
