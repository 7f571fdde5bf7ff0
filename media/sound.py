"""Sound of a file: read and written in step with the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

from .clip import Sound, part_of_sound

LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
KEPT = (1, 2, 6, 8)  # layouts every encoder here takes; others are mixed to stereo
USUAL_RATE = 48000


class SoundTrack:
    """Encodes a sound into an open container, up to the time its pictures have reached."""

    def __init__(self, output: Any, sound: Sound, encoder: str, seconds: Fraction) -> None:
        self._output, self._rate = output, sound.rate
        self._source = LAYOUTS.get(sound.channels, f"{sound.channels}c")
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
        frame = av.AudioFrame.from_ndarray(samples.contiguous().numpy(), format="fltp", layout=self._source)
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._written
        self._written += samples.shape[1]
        self._output.mux(self._stream.encode(frame))


def decoded(container: Any, stream: Any, start: float) -> Iterator[Tensor]:
    """The sound of an open file from `start` seconds on, with silence where it begins later.

    Shapes: float32 (channels, n) in -1..1, at the file's own rate and channels.
    """
    context = stream.codec_context
    resampler = av.AudioResampler(format="fltp", layout=context.layout, rate=context.sample_rate)
    ahead: int | None = None  # samples still to drop
    for frame in container.decode(stream):
        if ahead is None:
            begins = frame.time if frame.time is not None else start
            ahead = round((start - begins) * context.sample_rate)
            if ahead < 0:
                yield torch.zeros(context.layout.nb_channels, -ahead)
                ahead = 0
        for part in resampler.resample(frame):
            samples = torch.from_numpy(part.to_ndarray())
            if ahead < samples.shape[1]:
                yield samples[:, ahead:]
            ahead = max(0, ahead - samples.shape[1])
