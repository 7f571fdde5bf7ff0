"""Sound of a file: read and written in step with the pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

from .clip import Sound, part_of_sound
from .errors import VideoError

LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
KEPT = (1, 2, 6, 8)  # layouts every encoder here takes; others are mixed to stereo
USUAL_RATE = 48000
LEAD = 2.0
"""Seconds a decoder is given to come to the same sound as one that began at the beginning."""
log = logging.getLogger(__name__)


class SoundTrack:
    """Encodes a sound into an open container, up to the time its pictures have reached."""

    def __init__(self, output: Any, sound: Sound, encoder: str, seconds: Fraction) -> None:
        if sound.channels not in LAYOUTS:
            raise VideoError(f"The sound has {sound.channels} channels, and at most {max(LAYOUTS)} can be written. Mix "
                             "it down, or save the video without it.")  # fmt: skip
        self._output, self._rate = output, sound.rate
        self._source = LAYOUTS[sound.channels]
        rates = av.codec.Codec(encoder, "w").audio_rates
        rate = sound.rate if not rates or sound.rate in rates else USUAL_RATE
        layout = self._source if sound.channels in KEPT else "stereo"
        self._stream = output.add_stream(encoder, rate=rate, layout=layout)
        self._chunks = part_of_sound(sound, Fraction(0), seconds).chunks()
        self._written = 0

    def write_until(self, seconds: Fraction | float) -> None:
        """Encode on until the sound has reached this time, or its end."""
        while self._written < seconds * self._rate:
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            if chunk.shape[1]:
                self._encode(chunk)

    def finish(self) -> None:
        """Encode the rest."""
        self.write_until(float("inf"))
        self._output.mux(self._stream.encode(None))

    def _encode(self, samples: Tensor) -> None:
        packed = samples.T.reshape(1, -1).contiguous().numpy()  # planes are counted wrong where there are eight of them
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._source)
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._written
        self._written += samples.shape[1]
        self._output.mux(self._stream.encode(frame))


def decoded(container: Any, stream: Any, start: float, jump: bool = False) -> Iterator[Tensor]:
    """The sound of an open file from `start` seconds on, with silence where it begins later and for damaged parts.

    jump: decode from shortly before `start` on, not from the beginning of the file; yields nothing where the file
    leads nowhere, to a later place, or to one without a time.
    Shapes: float32 (channels, n) in -1..1, at the rate and channels that the file begins with.
    """
    context = stream.codec_context
    rate, channels = context.sample_rate, context.layout.nb_channels
    resampled, place = _Resampled(context.layout, rate), None  # place: of the next sample, from `start` on
    if jump:
        try:
            container.seek(int((start - LEAD) / stream.time_base), stream=stream)
        except av.error.FFmpegError:
            return
    for frame, after_damage in _frames(container, stream):
        if jump and place is None and (frame.time is None or frame.time > start):
            return
        if place is None or (after_damage and frame.time is not None):
            begins = round(((start if frame.time is None else frame.time) - start) * rate)
            silence = begins - max(0, place or 0)
            if silence > 0:
                yield torch.zeros(channels, silence)
            place = begins if place is None else max(place, begins)
        for samples in resampled(frame):
            if place + samples.shape[1] > 0:
                yield samples[:, max(0, -place) :]
            place += samples.shape[1]


class _Resampled:
    """What comes of frames at one rate and in one layout, also where those of a file change on the way."""

    def __init__(self, layout: Any, rate: int) -> None:
        self._layout, self._rate, self._seen = layout, rate, None

    def __call__(self, frame: Any) -> Iterator[Tensor]:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._seen:
            # Packed: PyAV counts planes up to an empty one, and behind eight of them there is none.
            self._resampler = av.AudioResampler(format="flt", layout=self._layout, rate=self._rate)
            self._seen = kind
        for part in self._resampler.resample(frame):
            yield torch.from_numpy(part.to_ndarray()).view(-1, self._layout.nb_channels).T


def _frames(container: Any, stream: Any) -> Iterator[tuple[Any, bool]]:
    """Decoded frames, and whether something before each could not be decoded, which is told once in the log."""
    damaged = told = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if not told:
                at = 0.0 if packet.dts is None else float(packet.dts * packet.time_base)
                log.warning("The sound is damaged at %.2f s (%s); there is silence instead.", at, error.strerror)
            damaged = told = True
            continue
        for frame in frames:
            yield frame, damaged
            damaged = False
