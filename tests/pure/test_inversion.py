"""DDIM inversion against the formulas in DDIM's own scale, written out in float64, and against diffusers' scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latentmotion.sampling.inversion import (
    Ascent,
    Convention,
    Prediction,
    Trajectory,
    climb,
    invert,
    plan_ascent,
    relative_rmse,
)
from latentmotion.sampling.noise import standardise
from latentmotion.sampling.windows import PlanError
from torch import Tensor

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
KEPT = torch.cumprod(1 - BETAS, 0)  # alphas_cumprod of Stable Diffusion
SIGMAS = ((1 - KEPT) / KEPT).sqrt()
LEAST = float(SIGMAS[0])
CLIP = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def schedule(steps: int) -> Tensor:
    """Timesteps 1, 21, ... as DDIM spaces them, falling to level 0."""
    return torch.cat([SIGMAS[1 :: 1000 // steps], SIGMAS.new_zeros(1)]).sort(descending=True).values


def network(z: Tensor, t: int) -> Tensor:
    """Stands for the UNet: from latents of variance about 1 and the timestep it is told; frames see each other."""
    return torch.tanh(z + 0.4 * z.roll(1, 0)) * (0.6 + 0.0004 * t) + 0.1 * z.mean(0)


def timestep(sigma: Tensor) -> int:
    return int((SIGMAS - sigma).abs().argmin())


def denoise(x: Tensor, sigma: Tensor, prediction: Prediction = Prediction.NOISE) -> Tensor:
    """The network as the host calls it, which multiplies a noise by the level it was told."""
    z = x / (1 + sigma**2).sqrt()
    out = network(z, timestep(sigma))
    if prediction is Prediction.NOISE:
        return x - sigma * out
    return x / (1 + sigma**2) - out * sigma / (1 + sigma**2).sqrt()


def by_hand(z: Tensor, steps: int, convention: Convention, prediction: Prediction) -> list[Tensor]:
    """Tune-A-Video's loop in its own scale, for both conventions and predictions; states with level 0 as the first."""
    states, before = [z], None
    for t in range(1, 1000, 1000 // steps):
        now, then = (torch.tensor(1.0).double() if before is None else KEPT[before]), KEPT[t]
        told = t if convention is Convention.RELEASED else (before or 0)
        out = network(z, told)
        if prediction is Prediction.VELOCITY:
            clean, noise = now.sqrt() * z - (1 - now).sqrt() * out, now.sqrt() * out + (1 - now).sqrt() * z
        else:
            clean, noise = (z - (1 - now).sqrt() * out) / now.sqrt(), out
        z, before = then.sqrt() * clean + (1 - then).sqrt() * noise, t
        states.append(z)
    return states


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("prediction", Prediction)
def test_states_are_those_of_the_written_out_loop(steps: int, convention: Convention, prediction: Prediction) -> None:
    ascent = plan_ascent(schedule(steps), convention, LEAST, prediction)
    assert ascent.steps == steps
    found = [CLIP, *(x for x, _ in invert(lambda x, s: denoise(x, s, prediction), CLIP, ascent))]
    for x, level, z in zip(found, ascent.levels, by_hand(CLIP, steps, convention, prediction), strict=True):
        torch.testing.assert_close(x / (1 + level**2).sqrt(), z, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_released_convention_is_diffusers_inverse_scheduler(kind: str) -> None:
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     clip_sample=False, steps_offset=1, prediction_type=kind)  # fmt: skip
    scheduler.set_timesteps(20)
    prediction = Prediction.NOISE if kind == "epsilon" else Prediction.VELOCITY
    ascent = plan_ascent(schedule(20), Convention.RELEASED, LEAST, prediction)
    assert [timestep(s) for s in ascent.told] == scheduler.timesteps.tolist()
    z = CLIP
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, int(t)), t, z).prev_sample
    *_, (x, _) = invert(lambda x, s: denoise(x, s, prediction), CLIP, ascent)
    assert relative_rmse(x / (1 + ascent.levels[-1] ** 2).sqrt(), z) < 1e-5, "its table of levels is in float32"


def sampled(x: Tensor, sigmas: Tensor, model: object = denoise) -> Tensor:
    """Euler's method down the schedule, which is DDIM."""
    for high, low in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (low - high) * (x - model(x, high)) / high
    return x


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("sigmas", [schedule(1), schedule(7), torch.tensor([14.0, 3.0, 3.0, 0.5, 0.0]).double()])
def test_a_constant_noise_is_found_again_exactly(convention: Convention, sigmas: Tensor) -> None:
    noise = torch.randn(CLIP.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def constant(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * noise

    *_, (top, clean) = invert(constant, CLIP, plan_ascent(sigmas, convention, LEAST))
    torch.testing.assert_close(top, CLIP + sigmas[0] * noise, rtol=0, atol=1e-12)
    assert relative_rmse(sampled(top, sigmas, constant), CLIP) < 1e-13
    assert clean.shape == CLIP.shape


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The best denoiser of latents of variance 0.25: its path to noise is known, x sqrt(0.25 + sigma^2) / 0.5."""
    return x * 0.25 / (0.25 + sigma**2)


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("prediction", Prediction)
def test_more_steps_come_closer_to_the_true_path_and_back(convention: Convention, prediction: Prediction) -> None:
    """Of first order, back and forth: five times the steps make less than a third of the error."""
    ends, backs = [], []
    for steps in (8, 40, 200):
        ascent = plan_ascent(schedule(steps), convention, LEAST, prediction)
        *_, (top, _) = invert(gaussian, CLIP, ascent)
        ends.append(relative_rmse(top, CLIP * (0.25 + ascent.levels[-1] ** 2).sqrt() / 0.5))
        backs.append(relative_rmse(sampled(top, schedule(steps), gaussian), CLIP))
    assert ends[0] > ends[1] > 2 * ends[2] and backs[0] / 3 > backs[1] > 3 * backs[2], (ends, backs)
    assert ends[2] < 0.05 and backs[2] < 0.05


def test_what_the_network_is_told() -> None:
    sigmas = torch.tensor([8.0, 2.0, 0.5, 0.0])
    released = plan_ascent(sigmas, Convention.RELEASED, 0.03)
    standard = plan_ascent(sigmas, Convention.STANDARD, 0.03)
    assert released.told.tolist() == [0.5, 2.0, 8.0] and torch.equal(released.heard, sigmas)
    assert torch.allclose(standard.told, torch.tensor([0.03, 0.5, 2.0]))
    assert torch.allclose(standard.heard, torch.tensor([2.0, 0.5, 0.03, 0.0]))
    seen = []
    climb(lambda x, s: seen.append((x, s)) or x, torch.ones(1), released, 1)
    assert seen[0][1] == 2.0 and np.isclose(float(seen[0][0]), (5 / 1.25) ** 0.5), "variance 1 after the host's scaling"


@pytest.mark.parametrize("sigmas", [[3.0, 0.1], [0.0], [], [float("nan"), 0.0]])
def test_a_schedule_that_leads_nowhere_is_refused(sigmas: list[float]) -> None:
    with pytest.raises(PlanError, match="ends at noise level 0"):
        plan_ascent(torch.tensor(sigmas), Convention.STANDARD, 0.03)


def test_a_path_is_known_between_its_levels() -> None:
    ascent = plan_ascent(schedule(4), Convention.RELEASED, LEAST)
    states = torch.stack([CLIP, *(x for x, _ in invert(denoise, CLIP, ascent))])
    path = Trajectory(ascent.levels, states)
    for level, state in zip(ascent.levels, states, strict=True):
        torch.testing.assert_close(path.at(float(level)), state, rtol=0, atol=1e-12)
    low, high = ascent.levels[2:4]
    middle = path.at(float(low + 0.25 * (high - low)))
    torch.testing.assert_close(middle, 0.75 * states[2] + 0.25 * states[3], rtol=0, atol=1e-12)
    prolonged = path.at(float(ascent.levels[-1] * 1.1))
    assert not torch.equal(prolonged, states[-1]) and torch.isfinite(prolonged).all()
    with pytest.raises(PlanError, match="Set denoise of DDIM Inversion to 1"):
        path.at(float(ascent.levels[-1] * 2))


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 4, 5, 8, 8)])
def test_noise_is_standardised_frame_by_frame(shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.rand(*shape[:-2], 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    straight = standardise(noise)
    torch.testing.assert_close(standardise(weights * noise - 3 * weights), straight)
    torch.testing.assert_close(straight.std((-2, -1), correction=0), torch.ones(shape[:-2], dtype=torch.float64))
    assert standardise(torch.full(shape, 2.0)).abs().max() == 0.0  # nothing to be seen stays nothing


def test_noise_is_standardised_a_share_of_the_way() -> None:
    noise = 0.25 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2.0
    torch.testing.assert_close(standardise(noise, 0.0), noise)
    half, straight = standardise(noise, 0.5), standardise(noise)
    torch.testing.assert_close(half.mean((-2, -1)), noise.mean((-2, -1)) / 2)
    torch.testing.assert_close(half.std((-2, -1), correction=0), noise.std((-2, -1), correction=0).sqrt())
    torch.testing.assert_close(standardise(half), straight)
    assert torch.equal(standardise(torch.full((1, 8, 8), 2.0), 0.75), torch.full((1, 8, 8), 0.5))


def test_nothing_is_changed_in_place() -> None:
    kept = CLIP.clone()
    list(invert(denoise, CLIP, plan_ascent(schedule(4), Convention.STANDARD, LEAST)))
    assert torch.equal(CLIP, kept) and isinstance(plan_ascent(schedule(4), Convention.STANDARD, LEAST), Ascent)
