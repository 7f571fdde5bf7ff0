"""A clip as a promise: size, length and rate are known, pictures and sound come in chunks when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

CHUNK_FRAMES, CHUNK_BYTES = 16, 32 << 20
SAMPLES = 1 << 16


@dataclass(frozen=True)
class Sound:
    """Sound in chunks. `chunks()` gives a fresh iterator of float32 (channels, n) in -1..1, end to end, from time 0."""

    rate: int
    channels: int
    chunks: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Clip:
    """Pictures in chunks. `chunks()` gives a fresh iterator of CPU float32 (n, height, width, 3) in 0..1.

    The chunks, of any lengths, hold `frames` pictures in all. Units: frame_rate in pictures a second.
    shows_progress: to whoever waits for the chunks, so nobody else needs to.
    """

    frames: int
    height: int
    width: int
    frame_rate: Fraction
    chunks: Callable[[], Iterator[Tensor]]
    sound: Sound | None = None
    shows_progress: bool = False

    @property
    def seconds(self) -> Fraction:
        return self.frames / self.frame_rate


def chunk_length(height: int, width: int) -> int:
    """Pictures per chunk, so that a chunk of float32 RGB stays small; depends on the size of a picture only."""
    return max(1, min(CHUNK_FRAMES, CHUNK_BYTES // max(1, height * width * 12)))


def clip_of_images(images: Tensor, frame_rate: Fraction, sound: Sound | None = None) -> Clip:
    """A clip over pictures that are in memory already. Shapes: images (f, h, w, 3 or more)."""
    frames, height, width = images.shape[:3]
    step = chunk_length(height, width)

    def chunks() -> Iterator[Tensor]:
        for start in range(0, frames, step):
            yield images[start : start + step, ..., :3].float().cpu()

    return Clip(frames, height, width, frame_rate, chunks, sound)


def sound_of_samples(samples: Tensor, rate: int) -> Sound:
    """Sound that is in memory already. Shapes: samples (channels, n)."""

    def chunks() -> Iterator[Tensor]:
        for start in range(0, samples.shape[1], SAMPLES):
            yield samples[:, start : start + SAMPLES].float().cpu()

    return Sound(rate, samples.shape[0], chunks)


def mirrored_clip(clip: Clip) -> Clip:
    """Left and right exchanged."""

    def chunks() -> Iterator[Tensor]:
        return (chunk.flip(2) for chunk in clip.chunks())

    return replace(clip, chunks=chunks)


def part_of_clip(clip: Clip, start: int, frames: int) -> Clip:
    """The pictures `start` to `start + frames` with their sound; earlier ones are made and dropped."""

    def chunks() -> Iterator[Tensor]:
        return _cut(clip.chunks(), start, frames, dim=0)

    sound = clip.sound and part_of_sound(clip.sound, start / clip.frame_rate, frames / clip.frame_rate)
    return replace(clip, frames=frames, chunks=chunks, sound=sound)


def part_of_sound(sound: Sound, start: Fraction, seconds: Fraction) -> Sound:
    """The sound from `start` on for at most `seconds`."""
    first, count = round(start * sound.rate), round(seconds * sound.rate)
    return replace(sound, chunks=lambda: _cut(sound.chunks(), first, count, dim=1))


def _cut(chunks: Iterator[Tensor], start: int, length: int, dim: int) -> Iterator[Tensor]:
    """The entries `start` to `start + length` along `dim` of what the chunks hold end to end."""
    at, stop = 0, start + length
    for chunk in chunks:
        first, last = max(start - at, 0), min(stop - at, chunk.shape[dim])
        if last > first:
            yield chunk.narrow(dim, first, last - first)
        at += chunk.shape[dim]
        if at >= stop:
            return


def collect_pictures(clip: Clip, on_frame: Callable[[int], None] | None = None) -> Tensor:
    """Every picture at once, (frames, height, width, 3); the memory of the result and of one chunk."""
    images = torch.empty(clip.frames, clip.height, clip.width, 3)
    at = 0
    for chunk in clip.chunks():
        images[at : at + len(chunk)] = chunk
        at += len(chunk)
        if on_frame:
            on_frame(at)
    if at != clip.frames:
        raise ValueError(f"a clip of {clip.frames} frames gave {at}")
    return images


def collect_sound(sound: Sound) -> Tensor:
    """Every sample at once, (channels, n)."""
    return torch.cat([torch.zeros(sound.channels, 0), *sound.chunks()], dim=1)
