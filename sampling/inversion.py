"""DDIM inversion: up from a clip to the noise it came from, on the path a deterministic sampler would come down.

Source: Song et al., DDIM (arXiv 2010.02502), equation 14 read backwards, as Tune-A-Video does it
(`tuneavideo/util.py`, `ddim_loop`). Latents here are x = z / sqrt(alphas_cumprod) and noise levels
sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod), the host's scale, in which a step is
x_t = x_s + (sigma_t - sigma_s) noise. Paths begin at level 0, where host samplers end; the released code begins at that
of the first timestep, 0.03 for Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .windows import PlanError

FURTHEST = 1.5  # times the highest level of a path, to which its last step may be prolonged


class Convention(str, Enum):
    """What the network is told in the step from level s up to level t. The latent it is shown is at level s.

    RELEASED: t, as Tune-A-Video's code and most others. STANDARD: s, the level the latent is at.
    """

    RELEASED = "released code"
    STANDARD = "standard"


class Prediction(str, Enum):
    """What the network was trained to give."""

    NOISE = "noise"
    VELOCITY = "velocity"


@dataclass(frozen=True, eq=False)
class Ascent:
    """The steps of an inversion. levels (steps + 1,): noise levels from 0 up. told (steps,): what the network hears."""

    levels: Tensor
    told: Tensor
    prediction: Prediction = Prediction.NOISE

    @property
    def steps(self) -> int:
        return len(self.told)

    @property
    def heard(self) -> Tensor:
        """`told` as a schedule of the host: falling, with a 0 at its end. Shapes: -> (steps + 1,)."""
        return torch.cat([self.told.flip(0), self.levels.new_zeros(1)])


def plan_ascent(
    sigmas: Tensor, convention: Convention, least: float, prediction: Prediction = Prediction.NOISE
) -> Ascent:
    """Plan the way up along a sampler's schedule.

    sigmas: (steps + 1,) falling to 0. least: the lowest level the network knows; it is told that one for level 0.
    Raises PlanError for a schedule that does not end at 0, has no step, or is not finite (kl_optimal of one step).
    """
    levels = sigmas.flip(0)
    if len(levels) < 2 or float(levels[0]) != 0.0 or not bool(levels.isfinite().all()):
        raise PlanError("Inversion needs a schedule of at least one step that ends at noise level 0. Choose another "
                        "scheduler, or more steps.")  # fmt: skip
    told = levels[1:] if convention is Convention.RELEASED else levels[:-1].clamp(min=least)
    return Ascent(levels, told, prediction)


def climb(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, ascent: Ascent, number: int) -> tuple[Tensor, Tensor]:
    """One step up; the result and the clean clip that the network saw on the way.

    denoise: from latents in the scale of the level it is told, and that level, to clean latents. Shapes: x (f, ...).
    A velocity is read at the level of the latent, as diffusers' DDIMInverseScheduler does.
    """
    low, high, told = ascent.levels[number], ascent.levels[number + 1], ascent.told[number]
    shown = x * ((1 + told**2) / (1 + low**2)).sqrt()
    clean = denoise(shown, told)
    noise = (shown - clean) / told
    if ascent.prediction is Prediction.VELOCITY:
        velocity = (noise - told * clean) / (1 + told**2).sqrt()
        noise = velocity / (1 + low**2).sqrt() + x * low / (1 + low**2)
    return x + (high - low) * noise, clean


def invert(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, ascent: Ascent) -> Iterator[tuple[Tensor, Tensor]]:
    """What `climb` gives, step after step, from a clean clip x on."""
    for number in range(ascent.steps):
        x, clean = climb(denoise, x, ascent, number)
        yield x, clean


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A clip at every level of its inversion: levels (steps + 1,) from 0 up, states (steps + 1, f, ...)."""

    levels: Tensor
    states: Tensor

    def at(self, sigma: float) -> Tensor:
        """The clip at any level: steps are straight lines in sigma, so between two levels nothing is approximated.

        Shapes: -> (f, ...). Raises PlanError for a level far above the highest.
        """
        top = float(self.levels[-1])
        if sigma > FURTHEST * top:
            raise PlanError(f"The clip was inverted up to noise level {top:.4g}, and the sampler begins at "
                            f"{sigma:.4g}. Set denoise of DDIM Inversion to 1, and invert with the MODEL that is "
                            "sampled, motion module and noise schedule included.")  # fmt: skip
        upper = min(int((self.levels[1:] < sigma).sum()) + 1, len(self.levels) - 1)
        low, high = float(self.levels[upper - 1]), float(self.levels[upper])
        share = (sigma - low) / (high - low) if high > low else 1.0
        return torch.lerp(self.states[upper - 1], self.states[upper], share)


def relative_rmse(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what was wanted."""
    wanted = wanted.to(found)
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
