"""Long videos clip after clip, each clip led by the one before: reuse of noise and of sampler states.

Source: Gu et al., Reuse and Diffuse (VidRD), arXiv 2309.03549: frame-wise noise reversion (FNR), past-dependent noise
sampling (PNS) and denoising with staged guidance (DSG). The released code (`model/pipeline.py`) differs from the paper
in DSG by one state, see `Guidance`. Frames are the first axis of every tensor here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .windows import PlanError

ROUNDING = 1e-9  # a share of the steps that is a whole number but for rounding counts as that number


class Guidance(str, Enum):
    """Which states a led frame takes from the clip before when its first k steps are led; state s enters step s.

    PAPER: the results of those steps, states 1 to k. RELEASED: what enters them, states 0 to k - 1.
    """

    PAPER = "paper"
    RELEASED = "released code"


@dataclass(frozen=True)
class Reuse:
    """Settings of the scheme, with the names of the paper.

    length: N, frames per clip. prompt_frames: M, frames led by the clip before. alpha: share of old noise in the other
    frames. beta: share of the sampling steps, 0 to 1, in which the first frame is led.
    Raises PlanError for settings that no clip can follow.
    """

    length: int = 16
    prompt_frames: int = 8
    alpha: float = 4.0
    beta: float = 0.4
    guidance: Guidance = Guidance.PAPER

    def __post_init__(self) -> None:
        if self.length < 1:
            raise PlanError(f"clip_length is {self.length}; a clip needs at least 1 frame.")
        if not 0 <= self.prompt_frames <= self.length:
            raise PlanError(
                f"prompt_frames is {self.prompt_frames} and must lie between 0 and clip_length, "
                f"{self.length}. Half of it is usual."
            )
        if not self.alpha >= 0.0 or math.isinf(self.alpha):
            raise PlanError(f"alpha is {self.alpha}; it must be 0 (fresh noise) or a number above it.")
        if not 0.0 <= self.beta <= 1.0:
            raise PlanError(f"beta is {self.beta}; it is a share of the steps, between 0 and 1.")

    def guided_steps(self, steps: int) -> list[int]:
        """How many of the first `steps` are led, for each prompt frame: all of beta's share for the first, fewer for
        each further one."""
        m = self.prompt_frames
        return [math.ceil(self.beta * steps * (m - j) / m - ROUNDING) for j in range(m)]

    def led(self, state: int, steps: int) -> int:
        """Number of frames, from the first, whose state `state` (0 to `steps`) is that of the clip before."""
        first = 1 if self.guidance is Guidance.PAPER else 0
        return sum(first <= state < first + guided for guided in self.guided_steps(steps))

    def next_noise(self, former: Tensor, fresh: Tensor) -> Tensor:
        """Starting noise of a clip from that of the clip before, of unit variance as both are.

        Shapes: former, fresh (N, ...) -> (N, ...), sharing no memory with them.
        """
        reverse, m = former.flip(0), self.prompt_frames
        share = self.alpha / math.sqrt(1 + self.alpha**2)
        mixed = share * reverse[m:] + fresh[m:] / math.sqrt(1 + self.alpha**2)
        return torch.cat([reverse[:m], mixed])


class States:
    """The sampler's states of one clip that lead the next, and nothing else: of each state the frames that are led.

    Kept in the next clip's order, so reversed. Keyed by the number of the state, so that samplers may call their model
    as often as they like within a step.
    """

    def __init__(self, reuse: Reuse, steps: int) -> None:
        self.counts = {state: count for state in range(steps + 1) if (count := reuse.led(state, steps))}
        self._kept: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    def pass_on(self, x: Tensor, state: int) -> Tensor:
        """The state with its first frames led by the clip before, if there is one; kept to lead the clip after.

        Shapes: (N, ...) -> (N, ...). What is kept is the state after the replacement.
        """
        count = self.counts.get(state, 0)
        if not count:
            return x
        if state in self._kept:
            x = torch.cat([self._kept[state], x[count:]])
        self.keep(x, state)
        return x

    def keep(self, x: Tensor, state: int) -> None:
        """Keep the last frames of a clip in this state, (N, ...), to lead the clip after it."""
        self._kept[state] = x[-self.counts[state] :].flip(0)


def sample_clip(step: Callable[[Tensor, int], Tensor], x: Tensor, steps: int, states: States) -> Tensor:
    """Take all steps of one clip from its first state, led by the states of the clip before.

    step: from a state and its number to the next state; it must look at nothing but these two. Shapes: x (N, ...).
    """
    x = states.pass_on(x, 0)
    for number in range(steps):
        x = states.pass_on(step(x, number), number + 1)
    return x
