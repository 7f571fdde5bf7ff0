"""Clips of a moving camera, made of stills or other clips by crops that change from frame to frame; kornia computes.

Source: AnimateDiff, arXiv 2307.04725, section 4.3 (zooms whose crop shrinks or grows); the pseudo-videos of Reuse and
Diffuse (arXiv 2309.03549) and Video LDM (arXiv 2304.08818), which state no ranges: two windows drawn at random here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from ..media.clip import Clip, chunk_length, part_of_clip
from ..media.geometry import Frame, fit
from ..motion_modules.errors import TrainingError
from .dataset import Dataset, Film, Piece

RATE = Fraction(8)
CROP = 0.7  # least share of a picture's width in which further clips of the same zoom or roll are filmed


class Move(str, Enum):
    """What the camera does; the picture seems to do the opposite."""

    ZOOM_IN = "zoom in"
    ZOOM_OUT = "zoom out"
    PAN_LEFT = "pan left"
    PAN_RIGHT = "pan right"
    TILT_UP = "tilt up"
    TILT_DOWN = "tilt down"
    ROLL_CLOCKWISE = "roll clockwise"
    ROLL_ANTICLOCKWISE = "roll anticlockwise"
    RANDOM = "random"


ALIKE = (Move.ZOOM_IN, Move.ZOOM_OUT, Move.ROLL_CLOCKWISE, Move.ROLL_ANTICLOCKWISE)
"""Moves that see the middle of a picture, always the same way."""


@dataclass(frozen=True)
class CameraWork:
    """How camera clips are made.

    amount: share of the picture that a move goes through: a zoom ends at (or begins with) 1 - amount of the width, a
    pan slides by it, a roll turns by that much of a quarter. stills: the pictures stand still while the camera moves.
    each: clips of every piece. height, width: in pixels, 0 as the source.
    """

    move: Move
    frames: int = 16
    amount: float = 0.4
    stills: bool = True
    each: int = 1
    height: int = 0
    width: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.amount < 1:
            raise TrainingError(f"amount is {self.amount}, and must lie between 0 and 1: 0.4 for instance.")


def views(move: Move, frames: int, amount: float, aspect: float, generator: torch.Generator) -> Tensor:
    """Which window of the picture each frame sees: centre x and y, size and turn; always inside of it.

    Shapes: -> (frames, 4). Units: centre and size in widths and heights of the picture, turn clockwise in radians.
    aspect: width / height of picture and window.
    """
    time, least = torch.linspace(0, 1, frames), 1 - amount
    chance = torch.rand(6, generator=generator).tolist()
    x = y = torch.full((frames,), 0.5)
    size, turn = torch.full((frames,), least), torch.zeros(frames)
    if move in (Move.ZOOM_IN, Move.ZOOM_OUT):
        size = torch.exp(math.log(least) * (time if move is Move.ZOOM_IN else 1 - time))
    elif move in (Move.PAN_LEFT, Move.PAN_RIGHT):
        x = _between(time if move is Move.PAN_RIGHT else 1 - time, size)
        y = _between(torch.full((frames,), chance[0]), size)
    elif move in (Move.TILT_UP, Move.TILT_DOWN):
        y = _between(time if move is Move.TILT_DOWN else 1 - time, size)
        x = _between(torch.full((frames,), chance[0]), size)
    elif move in (Move.ROLL_CLOCKWISE, Move.ROLL_ANTICLOCKWISE):
        turn = (time - 0.5) * (amount * math.pi / 2) * (1 if move is Move.ROLL_CLOCKWISE else -1)
        most = float(turn.abs().max())
        size = torch.full((frames,), 1 / (math.cos(most) + math.sin(most) * max(aspect, 1 / aspect)))
    else:
        ends = torch.tensor([least ** chance[0], least ** chance[1]])
        size = torch.exp(torch.lerp(ends[0].log(), ends[1].log(), time))
        x, y = (torch.lerp(*_between(torch.tensor(chance[i : i + 2]), ends), time) for i in (2, 4))
    return torch.stack((x, y, size, turn), dim=1)


def cropped(windows: Tensor, generator: torch.Generator) -> Tensor:
    """The same move inside a part of the picture, chosen at random. Shapes: as `views`."""
    share, x, y = torch.rand(3, generator=generator).tolist()
    size = torch.tensor(CROP + (1 - CROP) * share)
    corner = torch.tensor([x, y]) * (1 - size)
    return torch.cat((corner + windows[:, :2] * size, windows[:, 2:3] * size, windows[:, 3:]), dim=1)


def _between(place: Tensor, size: Tensor) -> Tensor:
    """Centre of a window of this size, at the first edge for place 0 and at the other for 1."""
    return size / 2 + place * (1 - size)


def filmed(pictures: Tensor, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """What a camera sees through windows. Shapes: pictures (n, h, w, 3), windows (n, 4) as `views` -> (n, *size, 3)."""
    from kornia.geometry.transform import crop_and_resize  # seconds to import

    height, width = pictures.shape[1:3]
    finer = max(1, math.ceil(float(windows[:, 2].max()) * width / size[1] - 1e-3))
    target = size[0] * finer, size[1] * finer
    reach = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) / 2
    reach = reach * (1 - 1 / torch.tensor([target[1], target[0]])) * torch.tensor([width, height])  # pixel centres
    cosine, sine = windows[:, 3].cos(), windows[:, 3].sin()
    turned = torch.stack((cosine, -sine, sine, cosine), dim=1).view(-1, 2, 2)
    corners = (reach * windows[:, 2].view(-1, 1, 1)) @ turned.transpose(1, 2)
    corners = corners + (windows[:, :2] * torch.tensor([width, height]) - 0.5)[:, None]
    seen = crop_and_resize(pictures.movedim(3, 1), corners, target, padding_mode="border")
    return functional.avg_pool2d(seen, finer).movedim(1, 3).clamp(0, 1).contiguous()


def camera_clip(source: Clip, work: CameraWork, generator: torch.Generator, again: bool = False) -> Clip:
    """A clip of `work.frames` frames of the camera's move over a clip of as many frames, or of one. again: it has been
    filmed before, and a move without chances begins with a part of the picture."""
    size = Frame(work.height, work.width).size(source.height, source.width)
    windows = views(work.move, work.frames, work.amount, size[1] / size[0], generator)
    if again and work.move in ALIKE:
        windows = cropped(windows, generator)
    finest = 1 / float(windows[:, 2].min())
    frame = Frame(round(size[0] * finest), round(size[1] * finest))
    step = chunk_length(frame.height, frame.width)

    def chunks() -> Iterator[Tensor]:
        done = 0
        for chunk in source.chunks():
            pictures = fit(chunk, frame)
            if source.frames == 1:
                pictures = pictures.expand(work.frames, -1, -1, -1)
            for part in pictures.split(step):
                yield filmed(part, windows[done : done + len(part)], size)
                done += len(part)

    return Clip(work.frames, *size, RATE, chunks)


def camera_clips(dataset: Dataset, work: CameraWork) -> Dataset:
    """Camera clips of every piece of a data set, with its captions. Raises TrainingError for pieces too short."""
    pieces = dataset.pieces() if work.stills else dataset.long_enough(work.frames, 1)
    films = []
    for number, piece in enumerate(pieces):
        for copy in range(work.each):
            generator = torch.Generator().manual_seed((work.seed * 1_000_003 + number) * 1_009 + copy)
            source = _source(piece, 1 if work.stills else work.frames, generator)
            clip = camera_clip(source, work, generator, again=copy > 0)
            name = f"{piece.name} {work.move.value} {copy + 1}"
            films.append(Film(name, clip, (work.frames,), (piece.caption,)))
    return Dataset(tuple(films))


def _source(piece: Piece, frames: int, generator: torch.Generator) -> Clip:
    """As many frames of a piece, from a place chosen at random."""
    first = int(torch.randint(piece.frames - frames + 1, (), generator=generator))
    return part_of_clip(piece.film.clip, piece.start + first, frames)


def end_to_end(dataset: Dataset) -> Clip:
    """All films of a data set, one after another, to look at."""
    clips = [film.clip for film in dataset.films]
    frames = sum(clip.frames for clip in clips)
    return Clip(frames, clips[0].height, clips[0].width, RATE, lambda: chain.from_iterable(c.chunks() for c in clips))
