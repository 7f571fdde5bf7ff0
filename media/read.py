"""Reading a video file as a Clip: its packets are looked through once, its pictures are decoded chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from .clip import Clip, Sound, chunk_length
from .errors import VideoError
from .geometry import Frame, fit, turn
from .sound import decoded
from .timing import Selection, select
from .write import BT709, EXACT, FULL

FAR = 10  # seconds from which on sound is sought, not decoded from its beginning
ATTACHED_PICTURE = 1 << 10  # a cover picture of a sound file
UNSPECIFIED, HD_LINES = 2, 720
Source = str | Path | BytesIO


@dataclass(frozen=True)
class VideoFile:
    """What a look through the packets of a file tells.

    stamps: time stamp of each picture in the stream's unit, rising; None where the file has none and the order counts.
    times (f), end: when each picture begins and the last one ends, in seconds from the first.
    height, width: as stored; turns: quarters counter-clockwise to the upright picture; stretch: width of a pixel.
    sound: rate and channels; begins: container time of the first picture in seconds.
    """

    source: Source
    name: str
    stamps: np.ndarray | None
    times: np.ndarray
    end: float
    rates: tuple[Fraction, ...]
    height: int
    width: int
    turns: int
    stretch: Fraction
    sound: tuple[int, int] | None
    begins: float

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width on the screen."""
        size = self.height, max(1, round(self.width * self.stretch))
        return size[::-1] if self.turns % 2 else size


def read_clip(source: Source, name: str, selection: Selection, frame: Frame) -> Clip:
    """A video file as a clip that decodes while its chunks are asked for.

    Raises VideoError, now or from the chunks, where the file is broken, is no video, or has no such frames.
    """
    file = inspect(source, name)
    taken, rate = select(file.times, file.end, list(file.rates), selection)
    if not len(taken):
        raise VideoError(
            f"{name} has {len(file.times)} frames ({file.end:.2f} s), and none is left after the first "
            f"{selection.skip} are skipped. Lower skip_frames."
        )
    height, width = frame.size(*file.upright)
    sound = file.sound and _sound(file, selection, rate, len(taken))
    return Clip(len(taken), height, width, rate, lambda: _chunks(file, taken, frame), sound)


def inspect(source: Source, name: str) -> VideoFile:
    """Look through the packets of a file, and at its first picture for how it is turned. Raises VideoError."""
    with _opened(source, name) as container:
        stream = _video_stream(container, name)
        first = next(_pictures(container, stream, name), None)
        if first is None:
            raise VideoError(f"{name} is damaged or empty: no picture in it can be decoded. Copy or download it again.")
        size, turns = (first.height, first.width), round((first.rotation or 0) / 90) % 4
    with _opened(source, name) as container:
        stream = _video_stream(container, name)
        rates = tuple(Fraction(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate)
        found, last = _stamps(container, stream, name)
        if "avi" in container.format.name and stream.codec_context.has_b_frames:
            found = [None] * len(found)  # its stamps are in the order of decoding
        stamps, times, end = _times(found, last, stream, rates)
        audio = next((s for s in container.streams.audio if s.codec_context is not None), None)
        heard = audio and (audio.codec_context.sample_rate, audio.codec_context.layout.nb_channels)
        sound = heard if heard and all(heard) else None
        begins = 0.0 if stamps is None else float(stamps[0] * stream.time_base)
        stretch = Fraction(stream.sample_aspect_ratio or 1)
        return VideoFile(source, name, stamps, times, end, rates, *size, turns, stretch, sound, begins)


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Any]:
    """The open file. Errors of ffmpeg on the way become VideoErrors."""
    if isinstance(source, BytesIO):
        source = BytesIO(source.getbuffer())
    try:
        with av.open(source if isinstance(source, BytesIO) else str(source)) as container:
            yield container
    except FileNotFoundError as error:
        raise VideoError(f"{name} is not there any more. Choose another file.") from error
    except (OSError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(
            f"{name} cannot be read as a video ({reason}): it is damaged, cut off, or of another kind. "
            "Play it to see, copy or download it again, or convert it to mp4."
        ) from error


def _video_stream(container: Any, name: str) -> Any:
    streams = [s for s in container.streams.video if not int(s.disposition) & ATTACHED_PICTURE]
    if not streams:
        held = "only sound" if container.streams.audio else "neither pictures nor sound"
        raise VideoError(
            f"{name} has no video in it, {held}. Choose a file with pictures"
            f"{', or load it with Load Audio' * bool(container.streams.audio)}."
        )
    if streams[0].codec_context is None:
        raise VideoError(f"{name} is compressed in a way that this ComfyUI's PyAV cannot decode. Convert it to mp4.")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _stamps(container: Any, stream: Any, name: str) -> tuple[list[int | None], int]:
    """Time stamp of each packet that holds a picture, from the first key frame on, and how long the last one lasts."""
    found, keys, last = [], [], (0, 0)
    for packet in container.demux(stream):
        if packet.is_corrupt and "mov" in container.format.name:
            raise VideoError(f"{name} is cut off after {len(found)} frames. Copy or download it again.")
        if packet.size and not packet.is_discard:
            found.append(packet.pts)
            keys.append(packet.is_keyframe)
            last = max(last, (packet.pts or 0, packet.duration or 0))
    if not found:
        raise VideoError(f"{name} is cut off or empty: there is not one picture in it. Copy or download it again.")
    first = keys.index(True) if True in keys else 0
    if found[first] is not None:  # pictures before the first key frame on the screen need one that is not there
        return [stamp for stamp in found[first:] if stamp is None or stamp >= found[first]], last[1]
    return found[first:], last[1]


def _times(stamps: list[int | None], last: int, stream: Any, rates: tuple[Fraction, ...]
           ) -> tuple[np.ndarray | None, np.ndarray, float]:  # fmt: skip
    """Stamps, times and end of a VideoFile. Without stamps pictures follow each other at the rate the file names."""
    if None in stamps:
        rate = float(rates[0]) if rates else 25.0
        return None, np.arange(len(stamps)) / rate, len(stamps) / rate
    rising = np.unique(np.array(stamps, dtype=np.int64))
    unit = float(stream.time_base)
    times = (rising - rising[0]) * unit
    step = last * unit or (float(np.median(np.diff(times))) if len(times) > 1 else 1 / float(rates[0] if rates else 25))
    return rising, times, float(times[-1]) + step


def _pictures(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Decoded frames in the order of the screen. Raises VideoError at damage, except before the first good frame."""
    good = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if good:
                raise VideoError(
                    f"{name} is damaged after {good} decoded frames ({error.strerror}). Copy or download it again, or "
                    "load only what comes before (frame_cap) or after it (skip_frames)."
                ) from error
            continue
        good += len(frames)
        yield from frames


def _chunks(file: VideoFile, taken: np.ndarray, frame: Frame) -> Iterator[Tensor]:
    """The taken pictures, upright and resized, as chunks of a Clip."""
    size = chunk_length(max(file.height, frame.height), max(file.width, frame.width))
    held: list[Tensor] = []
    for picture in _wanted(file, taken):
        held.append(picture)
        if len(held) == size:
            yield _finish(held, file, frame)
            held = []
    if held:
        yield _finish(held, file, frame)


def _finish(pictures: list[Tensor], file: VideoFile, frame: Frame) -> Tensor:
    """Bytes (h, w, 3) as floats (n, h', w', 3)."""
    return fit(turn(torch.stack(pictures), file.turns).float() / 255.0, frame, file.upright)


def _wanted(file: VideoFile, taken: np.ndarray) -> Iterator[Tensor]:
    """The taken pictures as bytes (h, w, 3), in order and repeated; one that does not come is the one before it."""
    place, before = 0, None
    for index, frame in _numbered(file, int(taken[0])):
        while place < len(taken) and taken[place] < index:
            yield _rgb(frame if before is None else before, file)
            place += 1
        while place < len(taken) and taken[place] == index:
            yield _rgb(frame, file)
            place += 1
        if place == len(taken):
            return
        before = frame
    if before is None:
        raise VideoError(f"{file.name} is damaged: none of the frames asked for can be decoded.")
    for _ in range(place, len(taken)):
        yield _rgb(before, file)


def _numbered(file: VideoFile, first: int) -> Iterator[tuple[int, Any]]:
    """Decoded frames with their places in the file, from the last key frame before `first` on if it can be found."""
    stamps = file.stamps
    if stamps is None:
        with _opened(file.source, file.name) as container:
            yield from enumerate(_pictures(container, _video_stream(container, file.name), file.name))
        return
    for seek in (True, False) if first else (False,):
        with _opened(file.source, file.name) as container:
            stream = _video_stream(container, file.name)
            if seek:
                container.seek(int(stamps[first]), stream=stream)
            frames = (f for f in _pictures(container, stream, file.name) if f.pts is not None)
            start = next(frames, None)
            if seek and (start is None or start.pts > stamps[first]):
                continue
            for frame in chain([start] if start else [], frames):
                yield int(np.searchsorted(stamps, frame.pts, side="right")) - 1, frame
            return


def _rgb(frame: Any, file: VideoFile) -> Tensor:
    """A decoded frame as bytes (h, w, 3). Untagged pictures are BT.709 from 720 lines on and BT.601 below, as players
    have it."""
    high = frame.height >= HD_LINES and frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
    rgb = frame.reformat(width=file.width, height=file.height, format="rgb24", interpolation=EXACT,
                         src_colorspace=BT709 if high else None, dst_color_range=FULL)  # fmt: skip
    return torch.from_numpy(rgb.to_ndarray())


def _sound(file: VideoFile, selection: Selection, rate: Fraction, frames: int) -> Sound:
    """The file's sound over the taken frames, at its own speed."""
    start = selection.skip / (rate * selection.every_nth)
    length = round(frames / rate * file.sound[0])

    def chunks() -> Iterator[Tensor]:
        done = 0
        for jump in (True, False) if start > FAR and file.stamps is not None else (False,):
            with _opened(file.source, file.name) as container:
                stream = next(s for s in container.streams.audio if s.codec_context is not None)
                for samples in decoded(container, stream, file.begins + float(start), jump):
                    yield samples[:, : length - done]
                    done += samples.shape[1]
                    if done >= length:
                        return
            if done:
                return

    return Sound(*file.sound, chunks)
