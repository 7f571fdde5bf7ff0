"""Camera moves of the toy world: drawn stills a camera can film, and how much of its move a clip shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from ..demo import oracle
from ..demo.captions import COLOURS, GROUNDS, SHAPES, sentences
from ..demo.oracle import Reading
from ..demo.world import EXTENT, SIZE, Scene, draw
from ..training.camera import Move

CLEARANCE = 2.0  # pixels between a shape and the border of every frame
ARM = 24.0  # least distance of a shape from the middle it is to turn about
LEAST_ZOOM = 1.25  # times larger or smaller that counts as a zoom
LEAST_TURN = 15.0  # degrees about the middle that count as a roll
ROUND = 0.25  # share that its distance from the middle may differ by meanwhile
TURNS = (-30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0)
"""Degrees that outlines may be turned by where the camera rolls."""

Clip = list[Reading]


@dataclass(frozen=True)
class Camera:
    """One move and how it is read.

    amount: that of Camera Motion Clips. radius: smallest and largest half extent of a filmed shape, in the closest
    view. effect: how much of the move a clip shows. present: whether it shows it, beside the same seed without.
    turns: degrees an outline may be turned by. steady: whether no step goes the other way, where that is asked.
    """

    move: Move
    amount: float
    radius: tuple[float, float]
    effect: Callable[[Clip], float]
    present: Callable[[Clip, Clip], bool]
    turns: tuple[float, ...] = (0.0,)
    steady: Callable[[Clip], bool] | None = None

    def read(self, clip: Tensor) -> Clip:
        return oracle.read(clip, [math.radians(turn) for turn in self.turns])

    @property
    def canvas(self) -> int:
        """Side of a picture whose closest view is SIZE pixels wide, so that no frame is enlarged."""
        if self.rolls:
            half = self.amount * math.pi / 4
            return round(SIZE * (math.cos(half) + math.sin(half)))
        return round(SIZE / (1 - self.amount))

    @property
    def rolls(self) -> bool:
        return self.move in (Move.ROLL_CLOCKWISE, Move.ROLL_ANTICLOCKWISE)

    @property
    def slide(self) -> int:
        """Pixels the view slides by."""
        return self.canvas - SIZE if self.move in (Move.PAN_LEFT, Move.PAN_RIGHT) else 0


def stills(camera: Camera, count: int, seed: int) -> tuple[Tensor, str]:
    """Pictures whose shape stays in view all through the move, and their captions, none of which says a direction.

    Shapes: -> (count, canvas, canvas, 3) in [0, 1], and `count` lines.
    """
    rng, every = np.random.default_rng(seed), sentences("train", False)
    words = [every[i] for i in rng.permutation(len(every))[:count]]
    radius = rng.uniform(*camera.radius, count)
    room = SIZE / 2 - CLEARANCE - EXTENT * radius - camera.slide / 2
    if camera.rolls:
        angle, arm = rng.uniform(0, 2 * np.pi, count), rng.uniform(ARM, np.maximum(ARM, room))
        offset = arm[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    else:
        offset = room[:, None] * rng.uniform(-1, 1, (count, 2))
    scene = Scene(
        np.array([SHAPES.index(w.shape) for w in words]),
        np.array([COLOURS[w.colour] for w in words]),
        np.array([GROUNDS[w.ground] for w in words]),
        camera.canvas / 2 + offset,
        radius,
        np.zeros(count, bool),
    )
    return draw(scene, (0, 0, camera.canvas, camera.canvas)), "\n".join(w.text for w in words)


def total(values: np.ndarray) -> float:
    """Change of a quantity over a clip, by the line fitted to it; NaN where a frame has none."""
    time = np.linspace(-0.5, 0.5, len(values))
    return float((time * (values - values.mean())).sum() / (time**2).sum())


def growth(clip: Clip) -> float:
    """Logarithm of how many times larger the shape becomes."""
    return total(np.log([reading.size for reading in clip]))


def slide(clip: Clip) -> float:
    """Pixels the shape goes to the right."""
    return total(np.array([reading.centre[0] for reading in clip]))


def swing(clip: Clip) -> float:
    """Degrees the shape goes clockwise about the middle of the picture."""
    x, y = np.array([reading.centre for reading in clip]).T - SIZE / 2
    return math.degrees(total(np.unwrap(np.arctan2(y, x))))


def zooms(clip: Clip, still: Clip, growing: bool) -> bool:
    """The shape grows (or shrinks) by a quarter more than without."""
    sign = 1 if growing else -1
    return sign * (growth(clip) - np.nan_to_num(growth(still))) > math.log(LEAST_ZOOM)


def pans(clip: Clip, still: Clip, direction: str) -> bool:
    """The shape goes that way, an eighth of the picture further than without."""
    sign = 1 if direction == "right" else -1
    return oracle.path(clip)[0] == direction and sign * (slide(clip) - np.nan_to_num(slide(still))) > SIZE / 8


def rolls(clip: Clip, still: Clip, sign: int) -> bool:
    """The shape goes round the middle at its distance, LEAST_TURN further than without. sign: +1 clockwise."""
    arms = np.hypot(*(np.array([reading.centre for reading in clip]).T - SIZE / 2))
    round_it = bool((np.abs(arms / arms.mean() - 1) < ROUND).all())
    return round_it and sign * (swing(clip) - np.nan_to_num(swing(still))) > LEAST_TURN


CAMERAS = {
    "zoom_in": Camera(Move.ZOOM_IN, 0.4, (17.0, 25.0), growth, partial(zooms, growing=True),
                      steady=partial(oracle.monotonic, growing=True)),
    "zoom_out": Camera(Move.ZOOM_OUT, 0.4, (17.0, 25.0), growth, partial(zooms, growing=False),
                       steady=partial(oracle.monotonic, growing=False)),
    "pan_left": Camera(Move.PAN_LEFT, 0.3, (14.0, 20.0), slide, partial(pans, direction="right")),
    "pan_right": Camera(Move.PAN_RIGHT, 0.3, (14.0, 20.0), slide, partial(pans, direction="left")),
    "roll": Camera(Move.ROLL_CLOCKWISE, 0.35, (14.0, 20.0), swing, partial(rolls, sign=-1), TURNS),
}  # fmt: skip
