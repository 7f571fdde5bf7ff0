"""Writing a clip, picture by picture: under another name beside its place, and moved there when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from . import metadata as meta
from . import pictures
from .clip import Clip
from .errors import VideoError, write_failure
from .formats import FILMS, Codec, Container, Format
from .sound import SoundTrack

BT709, LIMITED, FULL = 1, 1, 2
# Of swscale: bicubic, exact rounding, chroma taken from and given to every pixel. Within 1/255 for plain colours.
EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000


@dataclass(frozen=True)
class Writing:
    """How a clip is written. `on_frame(done)` is called after every picture; what it raises ends the writing.

    Units: quality 0..100. `metadata` goes into the file as JSON, by name.
    """

    quality: int
    metadata: dict[str, Any] = field(default_factory=dict)
    on_frame: Callable[[int], None] = lambda done: None
    ten_bit: bool = False
    crf: float | None = None


def write(clip: Clip, path: Path, form: Format, how: Writing) -> None:
    """Write a file, or a folder of numbered PNG files, at `path`, which appears when it is whole and not before.

    Raises VideoError when that cannot be done, and whatever the clip's own chunks or `how.on_frame` raise.
    """
    if form in FILMS:
        write_film(clip, path, *FILMS[form], how)
        return
    with beside(path) as unfinished:
        frames = _counted(clip, how.on_frame)
        if form is Format.WEBP:
            pictures.write_webp(frames, clip, unfinished, how.quality, how.metadata)
        else:
            pictures.write_pngs(frames, unfinished, path.name, how.metadata)


def write_film(clip: Clip, target: Path | BytesIO, container: Container, codec: Codec, how: Writing) -> None:
    """Write a film with its sound, to a path or into memory. Raises as `write` does."""
    if not clip.frames:
        raise VideoError("The video has no frames, so there is nothing to save.")
    codec.encoder()
    codec.check(clip)
    if isinstance(target, BytesIO):
        _mux(clip, target, container, codec, how)
        return
    with beside(target) as unfinished:
        _mux(clip, unfinished, container, codec, how)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path to write to beside `path`: moved there if all goes well, removed if not.

    Raises VideoError for errors of the system and of ffmpeg.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, av.error.FFmpegError) as error:
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink()


def _counted(clip: Clip, on_frame: Callable[[int], None]) -> Iterator[Tensor]:
    """The clip's pictures as bytes (h, w, 3) uint8; each is reported when the next one is asked for."""
    for done, picture in enumerate(_single(clip), 1):
        yield (picture * 255.0).round().clamp(0, 255).to(torch.uint8)
        on_frame(done)


def _single(clip: Clip) -> Iterator[Tensor]:
    """The clip's pictures one at a time. Raises VideoError when there are fewer or more than the clip has."""
    count = 0
    for chunk in clip.chunks():
        for picture in chunk:
            count += 1
            if count > clip.frames or tuple(picture.shape[:2]) != (clip.height, clip.width):
                raise VideoError(
                    f"The video should have {clip.frames} frames of {clip.width} x {clip.height}, and "
                    f"frame {count} is {picture.shape[1]} x {picture.shape[0]}."
                )
            yield picture.nan_to_num(0.0)
    if count != clip.frames:
        raise VideoError(f"The video ended after {count} of its {clip.frames} frames.")


def _mux(clip: Clip, target: Path | BytesIO, container: Container, codec: Codec, how: Writing) -> None:
    on_disk = isinstance(target, Path)
    options = {"movflags": "use_metadata_tags" + "+faststart" * on_disk} if container.mov else {}
    output = av.open(str(target) if on_disk else target, "w", format=container.muxer, options=options)
    try:
        output.metadata.update(meta.tags(how.metadata))
        _encode(clip, output, container, codec, how)
    except BaseException:
        with suppress(Exception):  # closing writes the rest of the file, which fails again on a full disk
            output.close()
        raise
    output.close()


def _encode(clip: Clip, output: Any, container: Container, codec: Codec, how: Writing) -> None:
    stream = _picture_stream(clip, output, codec, how)
    track = SoundTrack(output, clip.sound, container.sound, clip.seconds) if clip.sound else None
    for done, picture in enumerate(_single(clip), 1):
        output.mux(stream.encode(_yuv(picture, stream, codec.even)))
        if track:
            track.write_until(done / clip.frame_rate)
        how.on_frame(done)
    output.mux(stream.encode(None))
    if track:
        track.finish()


def _picture_stream(clip: Clip, output: Any, codec: Codec, how: Writing) -> Any:
    name, options = codec.encoder()
    crf = codec.crf(how.quality) if how.crf is None else how.crf
    stream = output.add_stream(name, rate=clip.frame_rate)
    odd = codec.even  # one row or column of pixels more where the encoder takes even sizes only
    stream.width, stream.height = clip.width + (odd and clip.width % 2), clip.height + (odd and clip.height % 2)
    stream.pix_fmt = "yuv420p10le" if how.ten_bit and codec.ten_bit else "yuv420p"
    stream.bit_rate = 0
    stream.options = options | {"crf": f"{crf:g}"}
    _tag(stream.codec_context)
    return stream


def _tag(target: Any) -> None:
    """BT.709 primaries, transfer and matrix, limited range, on a codec context or a frame.

    Frames of older PyAV know the last two only; what a file says comes from its codec context.
    """
    tags = {"color_primaries": BT709, "color_trc": BT709, "colorspace": BT709, "color_range": LIMITED}
    for name, value in tags.items():
        if hasattr(target, name):
            setattr(target, name, value)


def _yuv(picture: Tensor, stream: Any, even: bool) -> Any:
    """A picture (h, w, 3) in 0..1 as the frame the encoder takes; its last row and column repeated where it is odd."""
    if even and (picture.shape[0] % 2 or picture.shape[1] % 2):
        edges = (0, picture.shape[1] % 2, 0, picture.shape[0] % 2)
        picture = torch.nn.functional.pad(picture.movedim(2, 0)[None], edges, mode="replicate")[0].movedim(0, 2)
    deep = stream.pix_fmt != "yuv420p"
    top = 65535.0 if deep else 255.0
    pixels = (picture * top).round().clamp(0, top).contiguous().numpy().astype("uint16" if deep else "uint8")
    rgb = av.VideoFrame.from_ndarray(pixels, format="rgb48le" if deep else "rgb24")
    frame = rgb.reformat(format=stream.pix_fmt, dst_colorspace=BT709, src_color_range=FULL, dst_color_range=LIMITED,
                         interpolation=EXACT)  # fmt: skip
    _tag(frame)
    return frame
