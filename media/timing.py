"""Which frames of a file become the frames of a clip: frame rate, skip, every nth, cap; by time stamps."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LARGEST_DENOMINATOR = 1001
SAME = 1e-4  # 29.97 means 30000/1001


@dataclass(frozen=True)
class Selection:
    """What to take of a file, in this order: resample to `frame_rate` (0: the file's), skip, every nth, at most `cap`.

    Units: skip and cap in frames after resampling; cap 0 takes all. Raises ValueError for values out of range.
    """

    frame_rate: Fraction = Fraction(0)
    skip: int = 0
    every_nth: int = 1
    cap: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frame_rate", 0), ("skip", 0), ("every_nth", 1), ("cap", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")


def file_rate(times: np.ndarray, named: list[Fraction]) -> tuple[Fraction, bool]:
    """The frame rate of a file and whether it is constant.

    Constant: some named rate, or the mean one, puts every frame within half a frame of its place.
    Shapes: times (f) in seconds, rising, from 0. Units: named in frames a second, best first.
    """
    count = len(times)
    if count < 2 or times[-1] <= 0:
        return (named or [Fraction(1)])[0], True
    mean = Fraction((count - 1) / times[-1]).limit_denominator(LARGEST_DENOMINATOR)
    for rate in [*named, mean]:
        if np.abs(times * float(rate) - np.arange(count)).max() < 0.5:
            return rate, True
    return mean, False


def select(times: np.ndarray, end: float, named: list[Fraction], wanted: Selection) -> tuple[np.ndarray, Fraction]:
    """The file's frames to take, in order and with repeats, and the frame rate they play at.

    Where the rate changes (or the file has none that is constant), a frame is the one the file shows at that moment.
    Shapes: times (f) in seconds, rising, from 0 -> (n) indices into it. Units: end in seconds.
    """
    rate, constant = file_rate(times, named)
    target = wanted.frame_rate or rate
    if constant and abs(target / rate - 1) < SAME:
        target = rate
        taken = np.arange(len(times))
    else:
        taken = _shown_at(times, end, float(target))
    taken = taken[wanted.skip :: wanted.every_nth]
    return (taken[: wanted.cap] if wanted.cap else taken), Fraction(target) / wanted.every_nth


def _shown_at(times: np.ndarray, end: float, rate: float) -> np.ndarray:
    """Index of the frame on the screen at each tick of `rate`.

    Stamps are rounded to their container's unit, so a tick looks a tenth of the shorter step ahead.
    """
    steps = np.diff(times)
    shortest = min(1 / rate, float(np.median(steps)) if len(steps) else 1 / rate)
    ticks = np.arange(max(1, round(end * rate))) / rate + shortest / 10
    return np.clip(np.searchsorted(times, ticks, side="right") - 1, 0, None)
