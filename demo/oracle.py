"""Reads a picture or a clip of the toy world back without any network.

A frame is read only if it is what the world draws: one ground colour, one connected shape in one other colour, edges
between the two and nothing else (the mark on the clips excepted). Anything else is refused with a reason, so that a
model is never credited for a smear that happens to be red.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from . import world
from .captions import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Words

COLOUR_TOLERANCE = 0.17  # distance in RGB; the two closest colours, gray and purple, lie 0.38 apart
EDGE_TOLERANCE = 0.16  # how far a pixel may lie off the line from ground colour to shape colour
UNEXPLAINED = 0.01  # share of the picture that may be neither ground nor shape
OUTLINE_MATCH = 0.86  # overlap with the ideal outline, 1 is perfect
OUTLINE_MARGIN = 0.03  # and how much better than the next best outline
PIXELS = (60, 2600)  # smallest and largest area of a shape
MARK_MATCH = 0.5  # correlation with the stripes of the mark


@dataclass(frozen=True)
class Reading:
    """What one frame shows. `fault` is empty, or says why it is no picture of the world."""

    shape: str = ""
    colour: str = ""
    ground: str = ""
    centre: tuple[float, float] = (np.nan, np.nan)  # pixels, x then y
    size: float = np.nan  # square root of the area, pixels
    turn: float = 0.0  # of the outline, clockwise in radians
    mark: bool = False
    fault: str = ""

    def shows(self, words: Words) -> bool:
        """Whether shape, its colour and the ground are those of the caption."""
        return not self.fault and (self.shape, self.colour, self.ground) == (words.shape, words.colour, words.ground)


def read(clip: torch.Tensor, turns: Sequence[float] = (0.0,)) -> list[Reading]:
    """Read frames (f, h, w, 3) in [0, 1], h and w 128. turns: angles, in radians, an outline may be turned by."""
    frames = clip.detach().float().cpu().numpy()
    if frames.ndim != 4 or frames.shape[1:] != (world.SIZE, world.SIZE, 3):
        raise ValueError(f"expected frames of shape (f, {world.SIZE}, {world.SIZE}, 3), got {frames.shape}")
    return [_read_frame(frame, turns) for frame in frames]


def has_mark(frame: np.ndarray) -> bool:
    """Whether the stripes of the mark show: light and dark bars at its place that correlate with the drawn ones."""
    left, top, right, bottom = world.MARK
    row = frame[top + 2 : bottom - 2, left:right].mean(axis=(0, 2))
    stripes = world.mark_layer()[1][0, left:right, 0].numpy() - 0.5
    contrast = row - row.mean()
    strength = float(contrast @ stripes) / float(stripes @ stripes)
    norm = float(np.linalg.norm(contrast) * np.linalg.norm(stripes))
    return norm > 0 and strength > 0.15 and float(contrast @ stripes) / norm > MARK_MATCH


def _read_frame(frame: np.ndarray, turns: Sequence[float]) -> Reading:
    if not np.isfinite(frame).all():
        return Reading(fault="not finite")
    mark = has_mark(frame)
    counted = np.ones(frame.shape[:2], bool)
    if mark:
        left, top, right, bottom = world.MARK
        counted[max(top - 4, 0) : bottom + 3, left - 4 : right + 4] = False
    ground = np.median(frame[counted], axis=0)
    ground_name = _name(ground, GROUNDS)
    if ground_name is None:
        return Reading(mark=mark, fault="the ground has no colour of the world")
    away = np.linalg.norm(frame - ground, axis=-1) * counted
    if (away > 0.2).sum() < PIXELS[0]:
        return Reading(ground=ground_name, mark=mark, fault="no shape")
    colour = np.median(frame[away > 0.75 * np.percentile(away[away > 0.2], 90)], axis=0)
    colour_name = _name(colour, COLOURS)
    if colour_name is None:
        return Reading(ground=ground_name, mark=mark, fault="the shape has no colour of the world")
    span = colour - ground
    along = (frame - ground) @ span / (span @ span)
    aside = np.linalg.norm(frame - ground - along[..., None] * span, axis=-1)
    clean = (aside < EDGE_TOLERANCE) & (np.abs(along - 0.5) < 0.75)
    if (~clean & counted).mean() > UNEXPLAINED:
        return Reading(ground=ground_name, colour=colour_name, mark=mark, fault="a third colour")
    return _read_outline(np.clip(along, 0, 1) * counted, ground_name, colour_name, mark, turns)


def _read_outline(alpha: np.ndarray, ground: str, colour: str, mark: bool, turns: Sequence[float]) -> Reading:
    """Name the outline of a coverage map (h, w) by its overlap with each ideal one of the same centroid and area."""
    known = {"ground": ground, "colour": colour, "mark": mark}
    labels, count = ndimage.label(alpha > 0.5)
    if count == 0:
        return Reading(**known, fault="no shape")
    areas = ndimage.sum_labels(alpha > 0.5, labels, range(1, count + 1))
    largest = int(np.argmax(areas)) + 1
    if areas.sum() - areas.max() > max(0.03 * areas.max(), 12):
        return Reading(**known, fault="more than one shape")
    alpha = alpha * ndimage.binary_dilation(labels == largest, iterations=3)
    area = float(alpha.sum())
    if not PIXELS[0] <= area <= PIXELS[1]:
        return Reading(**known, fault=f"a shape of {area:.0f} pixels")
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    centre = np.array([(alpha * x).sum(), (alpha * y).sum()]) / area
    ideals = np.stack([_ideals(centre, area, turn) for turn in turns])
    turned = np.minimum(ideals, alpha).sum((2, 3)) / np.maximum(ideals, alpha).sum((2, 3))
    overlaps = turned.max(0)
    best = int(np.argmax(overlaps))
    known |= {"centre": (float(centre[0]), float(centre[1])), "size": area**0.5}
    known["turn"] = float(turns[int(np.argmax(turned[:, best]))])
    if overlaps[best] < OUTLINE_MATCH or overlaps[best] - np.sort(overlaps)[-2] < OUTLINE_MARGIN:
        return Reading(**known, fault=f"no clear outline (best is {SHAPES[best]}, {overlaps[best]:.2f})")
    return Reading(shape=SHAPES[best], **known)


UNIT_AREA = {"circle": np.pi, "square": 1.8**2, "triangle": 1.98, "cross": 4 * 1.1 * 0.84 - 0.84**2}


def _ideals(centre: np.ndarray, area: float, turn: float) -> np.ndarray:
    """Each shape of the world, drawn with this centroid, area and turn: (shapes, h, w)."""
    radii = np.array([(area / UNIT_AREA[name]) ** 0.5 for name in SHAPES])
    centres = np.tile(centre, (len(SHAPES), 1))
    return world.coverage(np.arange(len(SHAPES)), centres, radii, (0, 0, world.SIZE, world.SIZE), turn).numpy()


def _name(colour: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    nearest = min(distances, key=distances.get)
    return nearest if distances[nearest] < COLOUR_TOLERANCE else None


def path(readings: list[Reading]) -> tuple[str | None, float]:
    """Direction of travel and how straight it is.

    The direction is that of the line fitted to the centroids over time, None when it covers less than an eighth of
    the picture or lies more than 30 degrees off every direction of the world. Straightness is the R2 of that line:
    the share of the centroids' variance which steady motion explains. Frames without a shape count as R2 0.
    """
    centres = np.array([reading.centre for reading in readings])
    if len(centres) < 3 or np.isnan(centres).any():
        return None, 0.0
    time = np.linspace(-0.5, 0.5, len(centres))
    velocity = (time[:, None] * (centres - centres.mean(0))).sum(0) / (time**2).sum()
    residual = centres - centres.mean(0) - time[:, None] * velocity
    total = ((centres - centres.mean(0)) ** 2).sum()
    straightness = 1 - float((residual**2).sum() / total) if total > 0 else 0.0
    length = float(np.hypot(*velocity))
    if length < world.SIZE / 8:
        return None, straightness
    cosines = {name: float(velocity @ np.array(way)) / length for name, way in DIRECTIONS.items()}
    best = max(cosines, key=cosines.get)
    return (best if cosines[best] > np.cos(np.pi / 6) else None), straightness


def monotonic(readings: list[Reading], growing: bool, slack: float = 0.25) -> bool:
    """Whether the size changes by a quarter or more in the right sense over the clip, and no step goes the wrong way
    by more than `slack` pixels, which is the error of reading a size off the drawn edge."""
    sizes = np.array([reading.size for reading in readings])
    if len(sizes) < 3 or np.isnan(sizes).any():
        return False
    sizes = sizes if growing else sizes[::-1]
    return bool((np.diff(sizes) > -slack).all() and sizes[-1] > 1.25 * sizes[0])
