"""Parts of a training run of the demo, which look at other steps of the noise schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SCHEDULE = 1000


@dataclass(frozen=True)
class Phase:
    """until: share of the run at which it ends. focus: the steps of the schedule that half of its samples are from,
    the others are from all of them. ceiling: how much more the noisiest steps may count than the cleanest. in_a_row:
    the frames of a clip that are seen are neighbours. steady: how many times as much it counts how errors tremble from
    one frame to the next, where there is little noise. resting: half of its samples are clips whose captions name no
    direction, the others are any.
    """

    until: float
    focus: tuple[int, int] = (0, SCHEDULE)
    ceiling: float = 1.0
    in_a_row: bool = False
    steady: float = 0.0
    resting: bool = False

    def spread(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Steps of the schedule for `count` samples, evenly spread over both: less scatter than drawn freely. (n,)"""
        half = count // 2
        return np.concatenate([_even(count - half, 0, SCHEDULE, rng), _even(half, *self.focus, rng)])


def phase_at(phases: tuple[Phase, ...], step: int, steps: int) -> Phase:
    """The phase that a step of a run of so many is in."""
    return next(phase for phase in phases if step < phase.until * steps)


def _even(count: int, first: int, end: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers of [first, end), one from each of `count` equal parts."""
    return (first + (np.arange(count) + rng.random(count)) / count * (end - first)).astype(np.int64)
