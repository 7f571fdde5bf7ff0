"""Which frames of a long clip a video model sees together: planners from integers to lists of frame numbers.

Source: the schedules named in the field after neggles/animatediff-cli and AnimateDiff-Evolved; planned anew here so
that every frame is covered, no window repeats a frame and none is longer than asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Window = list[int]


class PlanError(ValueError):
    """Lengths that cannot make a plan; the message says which to change."""


class WindowSchedule(str, Enum):
    """How windows are laid over the clip, in the words of the field."""

    STATIC = "standard static"
    UNIFORM = "standard uniform"
    LOOPED = "looped uniform"
    BATCHED = "batched"


@dataclass(frozen=True)
class WindowPlan:
    """Settings of a plan. length, overlap: frames; stride: number of doublings of the frame step, 1 for none.

    Raises PlanError for settings that no clip could be planned with.
    """

    schedule: WindowSchedule = WindowSchedule.STATIC
    length: int = 16
    overlap: int = 4
    stride: int = 1
    closed_loop: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise PlanError(f"context_length is {self.length}; a window needs at least 1 frame.")
        if self.stride < 1:
            raise PlanError(f"context_stride is {self.stride}; it must be at least 1.")
        if not 0 <= self.overlap < self.length:
            raise PlanError(
                f"context_overlap is {self.overlap} and must be at least 0 and less than the "
                f"context_length, {self.length}. Half of the length is a good start."
            )

    @property
    def loops(self) -> bool:
        """Whether windows may run on from the last frame into the first, so that the clip has no ends."""
        return self.schedule == WindowSchedule.LOOPED

    @property
    def shared(self) -> int:
        """Frames that two neighbouring windows of one step have in common."""
        return 0 if self.schedule == WindowSchedule.BATCHED else self.overlap

    def windows(self, frames: int, step: int = 0) -> list[Window]:
        """Windows for a clip of `frames` frames at sampling step `step`; together they cover every frame."""
        if frames < 1:
            raise PlanError("the clip has no frames to plan windows for.")
        if frames <= self.length:
            return [list(range(frames))]
        return PLANNERS[self.schedule](self, frames, step)


def halving(step: int) -> float:
    """Fraction in [0, 1) with the bits of `step` mirrored behind the point: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    fraction, weight = 0.0, 0.5
    while step:
        fraction += weight * (step & 1)
        step >>= 1
        weight /= 2
    return fraction


def _starts(span: int, frames: int, hop: int, shift: int) -> list[int]:
    """First frames of windows `span` long, `hop` apart, moved by `shift`, pushed inside the clip."""
    last = frames - span
    return sorted({min(max(start, 0), last) for start in range(shift - hop, last + hop, hop)})


def _static(plan: WindowPlan, frames: int, step: int) -> list[Window]:
    hop = plan.length - plan.overlap
    return [list(range(a, a + plan.length)) for a in _starts(plan.length, frames, hop, 0)]


def _batched(plan: WindowPlan, frames: int, step: int) -> list[Window]:
    return [list(range(a, min(a + plan.length, frames))) for a in range(0, frames, plan.length)]


def _frame_steps(plan: WindowPlan, frames: int) -> list[int]:
    """1, 2, 4, ... as far as a window with that frame step still fits into the clip."""
    return [1 << k for k in range(plan.stride) if k == 0 or (plan.length << k) <= frames]


def _uniform(plan: WindowPlan, frames: int, step: int) -> list[Window]:
    windows = []
    for apart in _frame_steps(plan, frames):
        span, hop = (plan.length - 1) * apart + 1, plan.length * apart - plan.overlap
        shift = int(halving(step) * hop)
        windows += [list(range(a, a + span, apart)) for a in _starts(span, frames, hop, shift)]
    return windows


def _looped(plan: WindowPlan, frames: int, step: int) -> list[Window]:
    """Windows that run on from the last frame into the first. Without `closed_loop` the seam is met only where the
    moving pattern happens to lie across it; with it, one more window always bridges it with the asked overlap."""
    windows = []
    for apart in _frame_steps(plan, frames):
        hop = plan.length * apart - plan.overlap
        shift = round(halving(step) * frames)
        reach = frames if plan.closed_loop else frames - plan.overlap
        windows += [[(a + shift + k * apart) % frames for k in range(plan.length)] for a in range(0, reach, hop)]
    return windows


PLANNERS: dict[WindowSchedule, Callable[[WindowPlan, int, int], list[Window]]] = {
    WindowSchedule.STATIC: _static,
    WindowSchedule.UNIFORM: _uniform,
    WindowSchedule.LOOPED: _looped,
    WindowSchedule.BATCHED: _batched,
}
