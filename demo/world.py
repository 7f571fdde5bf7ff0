"""The toy world: one coloured shape over a coloured ground, standing or moving, drawn with soft edges.

Positions and sizes are in pixels of a 128 x 128 picture, y pointing down; time runs from 0 to 1 over a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from .captions import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Words

SIZE = 128
FRAMES = 16
RADIUS = (11.0, 25.0)  # half extent of a still shape
MOVING_RADIUS = (14.0, 21.0)
TRAVEL = (44.0, 56.0)  # distance covered in a clip
BEND = (0.2, 0.4)  # how far a curved way lies off the straight one at its middle, as a share of the distance
EXTENT = 1.2  # no shape reaches further than this many radii from its centre
FIELD = (1.0, 18.0, 127.0, 127.0)  # left, top, right, bottom of the part shapes live in; the mark sits above it
MARK = (80, 4, 120, 14)  # left, top, right, bottom of the defect on the clips: a striped, half transparent logo
MARK_STRIPE, MARK_ALPHA = 8, 0.65
ZOOM = (0.95, 1.6)  # magnification at the two ends of a zoom
ZOOMED_RADIUS = 16.0  # at most, so that a zoom's ends are about as small and as large as still shapes are

Window = tuple[int, int, int, int]
"""Left, top, width and height of the part of a picture that is drawn."""

Path = Callable[[np.ndarray], np.ndarray]
"""Times (f,) to offsets (f, 2) from the middle of the path, in units of the distance travelled."""


@dataclass(frozen=True)
class Scene:
    """n pictures: shape index (n,), colours (n, 3) in [0, 1], centre (n, 2) and radius (n,) in pixels, mark (n,)."""

    shape: np.ndarray
    colour: np.ndarray
    ground: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    mark: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | list[int]) -> Scene:
        return Scene(*(getattr(self, field.name)[index] for field in fields(self)))


def join(scenes: list[Scene]) -> Scene:
    return Scene(*(np.concatenate([getattr(scene, field.name) for scene in scenes]) for field in fields(Scene)))


def distance(shape: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance (negative inside) to a shape of radius 1 centred at its centroid."""
    name = SHAPES[shape]
    if name == "circle":
        return torch.hypot(x, y) - 1.0
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9
    if name == "triangle":  # apex (0, -1.2), base from (-1.1, 0.6) to (1.1, 0.6)
        slope = float(np.hypot(1.8, 1.1))
        return torch.maximum(y - 0.6, (1.8 * x.abs() - 1.1 * (y + 1.2)) / slope)
    arm, width = 1.1, 0.42
    flat = torch.maximum(x.abs() - arm, y.abs() - width)
    return torch.minimum(flat, torch.maximum(x.abs() - width, y.abs() - arm))


def coverage(
    shape: np.ndarray, centre: np.ndarray, radius: np.ndarray, window: Window, turn: float = 0.0
) -> torch.Tensor:
    """How much of each pixel the shape covers: (n, h, w) in [0, 1]. `window` is left, top, width, height; `turn` is
    clockwise, in radians."""
    left, top, width, height = window
    centres = torch.as_tensor(centre, dtype=torch.float32)
    radii = torch.as_tensor(radius, dtype=torch.float32)[:, None, None]
    x = (torch.arange(width) + left + 0.5)[None, None, :] - centres[:, 0, None, None]
    y = (torch.arange(height) + top + 0.5)[None, :, None] - centres[:, 1, None, None]
    x, y = x / radii, y / radii
    if turn:
        x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    out = torch.empty(len(radii), height, width)
    for index in np.unique(shape):
        rows = torch.as_tensor(np.flatnonzero(shape == index))
        gx, gy = torch.broadcast_tensors(x[rows], y[rows])
        out[rows] = (0.5 - distance(int(index), gx, gy) * radii[rows]).clamp(0.0, 1.0)
    return out


def draw(scene: Scene, window: Window = (0, 0, SIZE, SIZE)) -> torch.Tensor:
    """Pictures (n, h, w, 3) in [0, 1]."""
    alpha = coverage(scene.shape, scene.centre, scene.radius, window)[..., None]
    ground = torch.as_tensor(scene.ground, dtype=torch.float32)[:, None, None, :]
    colour = torch.as_tensor(scene.colour, dtype=torch.float32)[:, None, None, :]
    pictures = ground + alpha * (colour - ground)
    if scene.mark.any():
        rows = torch.as_tensor(np.flatnonzero(scene.mark))
        alpha, stripes = mark_layer(window)
        pictures[rows] = pictures[rows] * (1 - alpha) + stripes * alpha
    return pictures


def mark_layer(window: Window = (0, 0, SIZE, SIZE)) -> tuple[torch.Tensor, torch.Tensor]:
    """The defect's opacity and its black and white stripes, both (h, w, 1)."""
    left, top, width, height = window
    x, y = torch.arange(width)[None, :] + left, torch.arange(height)[:, None] + top
    inside = (x >= MARK[0]) & (x < MARK[2]) & (y >= MARK[1]) & (y < MARK[3])
    stripes = ((x - MARK[0]) // MARK_STRIPE % 2 == 0).expand_as(inside)
    return (inside.float() * MARK_ALPHA)[..., None], stripes.float()[..., None]


def straight(direction: str, bend: float = 0.0) -> Path:
    """A straight way in the caption's direction; `bend` bows it sideways by that share of its length."""
    ahead = np.array(DIRECTIONS[direction])
    aside = np.array([-ahead[1], ahead[0]])

    def path(time: np.ndarray) -> np.ndarray:
        bow = bend * (1 - (2 * time - 1) ** 2)
        return (time - 0.5)[:, None] * ahead + bow[:, None] * aside

    return path


def curved(rng: np.random.Generator) -> Path:
    """A way in one of the directions, bowed to one side by a share BEND of its length."""
    bend = rng.choice((-1.0, 1.0)) * rng.uniform(*BEND)
    return straight(str(rng.choice(list(DIRECTIONS))), bend)


def standing(time: np.ndarray) -> np.ndarray:
    """The way of a caption without a direction."""
    return np.zeros((len(time), 2))


def still(words: Words, rng: np.random.Generator, mark: bool = False) -> Scene:
    """One picture for a caption. With a direction in the caption it is composed as photographers do, with room
    ahead of the subject: a frame of a clip, taken early in it more often than late."""
    if words.direction:
        scene = clip(words, rng, mark=mark)
        time = rng.random() if rng.random() < 0.35 else rng.triangular(0.0, 0.0, 0.6)
        return scene[[round(time * (FRAMES - 1))]]
    radius = rng.uniform(*RADIUS)
    centre = rng.uniform(*_room(radius, np.zeros((1, 2))))
    return _scene(words, centre[None], np.array([radius]), mark)


def clip(
    words: Words,
    rng: np.random.Generator,
    frames: int = FRAMES,
    zoom: float = 0.0,
    mark: bool = False,
    path: Path | None = None,
) -> Scene:
    """The frames of one clip. `zoom` +1 magnifies the shape from ZOOM[0] to ZOOM[1] over the clip, -1 the reverse: the
    camera follows it, so that it goes its way as without; `path` overrides the way the caption says."""
    time = np.arange(frames) / max(frames - 1, 1)
    path = path or (straight(words.direction) if words.direction else standing)
    offsets = path(time) * rng.uniform(*TRAVEL)
    radius = rng.uniform(*MOVING_RADIUS)
    if not zoom:
        start = rng.uniform(*_room(radius, offsets))
        return _scene(words, start + offsets, np.full(frames, radius), mark)
    scale = np.exp(np.interp(zoom * (2 * time - 1), (-1, 1), np.log(ZOOM)))
    radius, offsets = min(radius, ZOOMED_RADIUS), offsets * 0.9
    rooms = [_room(radius * s, offset[None]) for s, offset in zip(scale, offsets, strict=True)]
    lows, highs = zip(*rooms, strict=True)
    low, high = np.max(lows, axis=0), np.min(highs, axis=0)
    start = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    return _scene(words, start + offsets, radius * scale, mark)


def _room(radius: float, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest start that keeps a shape inside the field at all its offsets."""
    low = np.array(FIELD[:2]) + EXTENT * radius - offsets.min(axis=0)
    high = np.array(FIELD[2:]) - EXTENT * radius - offsets.max(axis=0)
    return low, high


def _scene(words: Words, centre: np.ndarray, radius: np.ndarray, mark: bool) -> Scene:
    n = len(radius)
    return Scene(
        np.full(n, SHAPES.index(words.shape)),
        np.tile(COLOURS[words.colour], (n, 1)),
        np.tile(GROUNDS[words.ground], (n, 1)),
        centre,
        radius,
        np.full(n, mark),
    )
