"""Captioned videos to learn from: promises of pictures, and the checks that can be made before one is decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..media.clip import Clip, mirrored_clip
from ..motion_modules.errors import TrainingError
from .clips import captions_for, span_of

NAMED = 5  # files named in a message


@dataclass(frozen=True)
class Piece:
    """One shot of a film: its first frame there, its length and what it shows."""

    film: Film
    number: int
    start: int
    frames: int
    caption: str

    @property
    def name(self) -> str:
        return self.film.name if len(self.film.shots) == 1 else f"{self.film.name}, part {self.number},"


@dataclass(frozen=True, eq=False)
class Film:
    """A video and what it shows.

    shots: frames of each of its parts, in order; together they are those of the clip. captions: one for each part.
    found: the parts were looked for, so that those too short to learn from may be left out. mark: another text for
    other pictures, "" where that is not known.
    """

    name: str
    clip: Clip
    shots: tuple[int, ...]
    captions: tuple[str, ...]
    found: bool = False
    mark: str = ""

    def pieces(self) -> list[Piece]:
        starts = [sum(self.shots[:i]) for i in range(len(self.shots))]
        parts = zip(starts, self.shots, self.captions, strict=True)
        return [Piece(self, number, *part) for number, part in enumerate(parts, 1)]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Films to learn from. What is cut from them (frames, stride, start) is the training's choice."""

    films: tuple[Film, ...]

    def pieces(self) -> list[Piece]:
        return [piece for film in self.films for piece in film.pieces()]

    def usable(self, frames: int, stride: int) -> list[Piece]:
        """The pieces `frames` pictures at this stride can be cut from.

        Raises TrainingError where a film is shorter, where nothing is left, or where sizes differ.
        """
        self.check_sizes()
        return self.long_enough(frames, stride)

    def long_enough(self, frames: int, stride: int) -> list[Piece]:
        """As `usable`, of films of whatever sizes."""
        needed = span_of(frames, stride)
        short = [piece for piece in self.pieces() if piece.frames < needed]
        every = f" with a stride of {stride}" if stride > 1 else ""
        strict = [piece for piece in short if not piece.film.found]
        if strict:
            raise TrainingError(
                f"{strict[0].name} has {_frames(strict[0].frames)}, and {_frames(frames)}{every} need {needed}. "
                f"{_others(len(strict) - 1)}Choose fewer frames or a smaller stride, or give longer clips."
            )
        if len(short) == len(self.pieces()):
            longest = max((piece.frames for piece in short), default=0)
            raise TrainingError(
                f"None of the {len(short)} shots that were found is long enough: the longest has {longest} frames, and "
                f"{_frames(frames)}{every} need {needed}. Choose fewer frames or a smaller stride, raise "
                "shot_threshold to find fewer cuts, or give longer videos."
            )
        return [piece for piece in self.pieces() if piece.frames >= needed]

    def check_sizes(self, where: str = "on the node that loads them") -> None:
        """Raise TrainingError where the films are not of one size. where: they can be given one."""
        first = self.films[0]
        for film in self.films:
            if (film.clip.height, film.clip.width) != (first.clip.height, first.clip.width):
                raise TrainingError(
                    f"The videos differ in size: {first.name} is {first.clip.width} x {first.clip.height} and "
                    f"{film.name} {film.clip.width} x {film.clip.height}. Set width and height {where}."
                )

    def table(self) -> str:
        """One line for each piece: file, part, times, frames, size, rate and caption."""
        lines = []
        for piece in self.pieces():
            clip = piece.film.clip
            rate = float(clip.frame_rate)
            begin, end = piece.start / rate, (piece.start + piece.frames) / rate
            part = f" part {piece.number}" if len(piece.film.shots) > 1 else ""
            lines.append(f"{piece.film.name}{part}: {begin:.2f} s to {end:.2f} s, {_frames(piece.frames)} of "
                         f"{clip.width} x {clip.height}, {rate:g} a second: {piece.caption}")  # fmt: skip
        return "\n".join(lines)


def join(*datasets: Dataset) -> Dataset:
    """The films of all of them."""
    return Dataset(tuple(film for dataset in datasets for film in dataset.films))


def with_mirrored(dataset: Dataset) -> Dataset:
    """Every film a second time, left and right exchanged: as often as a coin would have it.

    Source: the random horizontal flip of whole clips in AnimateDiff's training code.
    """
    mirrored = [replace(film, name=f"{film.name} mirrored", clip=mirrored_clip(film.clip),
                        mark=film.mark and f"{film.mark} mirrored") for film in dataset.films]  # fmt: skip
    return join(dataset, Dataset(tuple(mirrored)))


def film_of_parts(name: str, clip: Clip, length: int, text: str) -> Film:
    """A clip as a film of parts that are `length` frames long (0: one part), with a caption for all or one for each.

    Raises TrainingError where the parts do not fill the clip, or captions are missing.
    """
    length = length or clip.frames
    if not clip.frames or clip.frames % length:
        raise TrainingError(
            f"{clip.frames} frames are no whole number of clips of {length}. Set clip_length to 0 if they are one clip."
        )
    parts = clip.frames // length
    return Film(name, clip, (length,) * parts, captions_for(parts, text))


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _others(count: int) -> str:
    return f"{count} other clip{' is' if count == 1 else 's are'} too short as well. " if count else ""
