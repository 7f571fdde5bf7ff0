"""The formats videos are written in: which containers and encoders, and what quality means for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import av.codec

from .clip import Clip
from .errors import VideoError

DEFAULT_QUALITY = 80  # colour bars come back within 2/255 in every format, see _crf and webp_quality


class Format(str, Enum):
    """What a user chooses."""

    MP4 = "mp4 (H.264)"
    WEBM_VP9 = "webm (VP9)"
    WEBM_AV1 = "webm (AV1)"
    WEBP = "animated webp"
    PNG = "png sequence"

    @property
    def extension(self) -> str:
        """Ending of the file, "" for a folder of files."""
        return "" if self is Format.PNG else f".{self.value.split(' ')[-1 if self is Format.WEBP else 0]}"


@dataclass(frozen=True)
class Codec:
    """One way to compress pictures: its encoders, best first, with their options, and what they need.

    `even`: height and width must be even. `crf` gives the encoder's constant rate factor of a quality 0..100.
    `least`: pixels of the shorter side, `fastest`: frames a second that it can do, 0 for any.
    """

    name: str
    encoders: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    crf: Callable[[int], float]
    even: bool = False
    ten_bit: bool = True
    least: int = 0
    fastest: int = 0

    def check(self, clip: Clip) -> None:
        """Raise VideoError for a clip that the encoder would refuse without a word, or never come back from."""
        if min(clip.height, clip.width) < self.least:
            raise VideoError(f"{self.name} cannot be written at {clip.width} x {clip.height}: both sides need at least "
                             f"{self.least} pixels. Choose another format, or make the pictures larger.")  # fmt: skip
        if 0 < self.fastest < clip.frame_rate:
            raise VideoError(f"{self.name} cannot be written at {float(clip.frame_rate):g} frames a second, only up to "
                             f"{self.fastest}. Choose another format or a lower rate.")  # fmt: skip

    def encoder(self) -> tuple[str, dict[str, str]]:
        """The first encoder this PyAV has, and its options. Raises VideoError where it has none of them."""
        for name, options in self.encoders:
            if name in av.codec.codecs_available:
                return name, dict(options)
        names = " or ".join(name for name, _ in self.encoders)
        raise VideoError(
            f"This ComfyUI cannot write {self.name} video: its PyAV was built without {names}. "
            "Choose another format, or install PyAV from its wheel with ComfyUI's own Python: python -m pip install "
            "--force-reinstall av"
        )


def _crf(quality: int) -> float:
    """From 50 to 1, on the scales of all three encoders. H.264 at 0 is a profile that browsers do not play."""
    return max(1.0, (100 - quality) / 2)


def webp_quality(quality: int) -> int:
    """On the scale of WebP's encoder, which at 80 brings colour bars back within 3/255, and from 95 on within 1/255.

    Rises to 96 at 80, and from there to 100.
    """
    return round(min(1.2 * quality, 80 + quality / 5))


H264 = Codec("H.264", (("libx264", ()),), _crf, even=True)
VP9 = Codec("VP9", (("libvpx-vp9", (("deadline", "good"), ("cpu-used", "4"), ("row-mt", "1"))),), _crf,
            ten_bit=False)  # fmt: skip
AV1 = Codec("AV1", (("libsvtav1", (("preset", "8"),)), ("libaom-av1", (("cpu-used", "6"), ("row-mt", "1")))),
            _crf, least=32, fastest=240)  # fmt: skip


@dataclass(frozen=True)
class Container:
    """One kind of file: ffmpeg's name for it, the sound it holds, and whether its index can go to the front."""

    name: str
    muxer: str
    sound: str
    mov: bool = False


MP4 = Container("mp4", "mp4", "aac", mov=True)
WEBM = Container("webm", "webm", "libopus")
MKV = Container("mkv", "matroska", "aac")

FILMS = {Format.MP4: (MP4, H264), Format.WEBM_VP9: (WEBM, VP9), Format.WEBM_AV1: (WEBM, AV1)}
