"""Reuse and Diffuse against the paper's formulas and the released loop, both written out here on full arrays."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from latentmotion.sampling.reuse import Guidance, Reuse, States, sample_clip
from latentmotion.sampling.windows import PlanError
from torch import Tensor

PAPER, RELEASED = Guidance.PAPER, Guidance.RELEASED
BETAS = [Fraction(0), Fraction(1, 10), Fraction(3, 10), Fraction(2, 5), Fraction(7, 10), Fraction(1)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "correlation"), [(0, 0.0), (1, 0.707), (2, 0.894), (4, 0.970), (8, 0.992)])
def test_noise_keeps_its_variance_and_the_papers_correlation(alpha: float, correlation: float) -> None:
    former, fresh = randn(6, 40_000), randn(6, 40_000, seed=1)
    before = former.clone(), fresh.clone()
    noise = Reuse(6, 2, float(alpha)).next_noise(former, fresh)
    assert torch.equal(noise[:2], former.flip(0)[:2])
    assert torch.allclose(noise.var(1), torch.ones(6, dtype=torch.float64), atol=0.03)
    assert torch.allclose((noise * former.flip(0)).mean(1)[2:], torch.tensor(correlation).double(), atol=0.02)
    noise.zero_()
    assert torch.equal(former, before[0]) and torch.equal(fresh, before[1])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("frames", "prompt"), [(8, 4), (8, 3), (8, 8), (8, 1), (8, 0)])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_led_states_are_those_of_the_two_rules(frames: int, prompt: int, beta: Fraction, steps: int) -> None:
    """Exact arithmetic on the rule in t for the paper, on the rule in s for the released code."""
    for guidance in Guidance:
        reuse = Reuse(frames, prompt, beta=float(beta), guidance=guidance)
        for state in range(steps + 1):
            led = 0
            for j in range(prompt):
                if guidance is PAPER:  # the step with result `state` began at t = 1 - (state - 1) / steps
                    t = 1 - Fraction(state - 1, steps)
                    led += state > 0 and t > (1 - beta) + beta * Fraction(j, prompt)
                else:
                    led += state < (prompt - j) * Fraction(steps, prompt) * beta
            assert reuse.led(state, steps) == led, (guidance, state)


def test_example_of_the_released_configuration() -> None:
    reuse = Reuse(8, 4, 4.0, 0.4)
    assert reuse.guided_steps(50) == [20, 15, 10, 5]
    assert [reuse.led(state, 50) for state in (0, 1, 5, 6, 20, 21)] == [0, 4, 4, 3, 1, 0]
    released = Reuse(8, 4, 4.0, 0.4, RELEASED)
    assert [released.led(state, 50) for state in (0, 1, 4, 5, 19, 20)] == [4, 4, 4, 3, 1, 0]


ALPHAS_CUMPROD = torch.linspace(0.01, 0.9999, 13, dtype=torch.float64)  # of the states, noisy to clean: 12 steps


def predicted_noise(z: Tensor, s: int) -> Tensor:
    """A smooth stand-in for the network, in which every frame sees its neighbours and the step."""
    return torch.tanh(z + 0.5 * z.roll(1, 0) - 0.3 * z.mean(0)) * (1 + 0.05 * s)


def ddim_step(z: Tensor, s: int) -> Tensor:
    now, then = ALPHAS_CUMPROD[s], ALPHAS_CUMPROD[s + 1]
    noise = predicted_noise(z, s)
    return then.sqrt() * (z - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise


def by_hand(reuse: Reuse, fresh: list[Tensor], guidance: Guidance) -> list[Tensor]:
    """The whole scheme with every state of every frame kept, flipped, and copied frame by frame."""
    n, m, steps = reuse.length, reuse.prompt_frames, len(ALPHAS_CUMPROD) - 1
    a = reuse.alpha / (1 + reuse.alpha**2) ** 0.5
    clips: list[Tensor] = []
    stored: list[Tensor] = []
    for i, noise in enumerate(fresh):
        z = noise.clone()
        if i:
            for j in range(n):
                old = stored[0][n - 1 - j]
                z[j] = old if j < m else a * old + noise[j] / (1 + reuse.alpha**2) ** 0.5
        states = []
        for s in range(steps):
            if i and guidance is RELEASED:
                for j in range(m):
                    if s < (m - j) * (steps / m) * reuse.beta:
                        z[j] = stored[s][n - 1 - j]
            states.append(z.clone())
            z = ddim_step(z, s)
            if i and guidance is PAPER:
                for j in range(m):
                    if 1 - s / steps > (1 - reuse.beta) + reuse.beta * j / m + 1e-9:
                        z[j] = stored[s + 1][n - 1 - j]
        stored = [*states, z.clone()]
        clips.append(z)
    return clips


@pytest.mark.parametrize("guidance", Guidance)
@pytest.mark.parametrize(("prompt", "alpha", "beta"), [
    (2, 4.0, 0.4), (4, 1.0, 0.75), (5, 0.0, 1.0), (6, 8.0, 0.5), (3, 2.0, 0.0), (0, 4.0, 0.4)])  # fmt: skip
def test_clips_are_those_of_the_written_out_scheme(guidance: Guidance, prompt: int, alpha: float, beta: float) -> None:
    reuse = Reuse(6, prompt, alpha, beta, guidance)
    fresh = [randn(6, 2, 3, 3, seed=seed) for seed in range(4)]
    states, noise, steps = States(reuse, 12), None, 12
    for mine, expected in zip(fresh, by_hand(reuse, fresh, guidance), strict=True):
        noise = mine if noise is None else reuse.next_noise(noise, mine)
        clip = sample_clip(ddim_step, noise, steps, states)
        torch.testing.assert_close(clip, expected, rtol=0, atol=1e-12)


def test_paper_and_released_code_differ_by_one_state() -> None:
    """With beta 1 the paper copies the last frame to the end; the released code computes its last step."""
    ends = {}
    for guidance in Guidance:
        reuse, states = Reuse(6, 3, 4.0, 1.0, guidance), States(Reuse(6, 3, 4.0, 1.0, guidance), 12)
        first = sample_clip(ddim_step, randn(6, 2), 12, states)
        second = sample_clip(ddim_step, reuse.next_noise(randn(6, 2), randn(6, 2, seed=1)), 12, states)
        ends[guidance] = float((second[0] - first[-1]).abs().max())
    assert ends[PAPER] == 0.0 and ends[RELEASED] > 1e-3


@pytest.mark.parametrize("guidance", Guidance)
def test_only_states_that_lead_are_kept(guidance: Guidance) -> None:
    """All states of 50 steps, 8 frames, 4 x 32 x 32 in fp32 are 6.6 MB; frames N - M and steps below beta S a fifth;
    and of these only the led ones, 20 + 15 + 10 + 5 frames."""
    reuse, frame = Reuse(8, 4, 4.0, 0.4, guidance), 4 * 32 * 32 * 4
    states = States(reuse, 50)
    for _ in range(2):
        sample_clip(lambda x, s: x + 1, torch.zeros(8, 4, 32, 32), 50, states)
        everything = 50 * 8 * frame
        assert round(everything / 1e6, 1) == 6.6
        assert states.bytes == 50 * frame == everything // 8 < everything // 5
        assert sum(kept.untyped_storage().nbytes() for kept in states._kept.values()) == states.bytes


def test_nothing_is_changed_in_place() -> None:
    noise, states = randn(6, 2), States(Reuse(6, 3, 4.0, 1.0, RELEASED), 12)
    kept = noise.clone()
    sample_clip(ddim_step, noise, 12, states)
    sample_clip(ddim_step, noise, 12, states)
    assert torch.equal(noise, kept)


@pytest.mark.parametrize(("settings", "name"), [
    ({"length": 0}, "clip_length"), ({"length": 8, "prompt_frames": 9}, "prompt_frames"),
    ({"prompt_frames": -1}, "prompt_frames"), ({"alpha": -0.1}, "alpha"), ({"alpha": float("nan")}, "alpha"),
    ({"alpha": float("inf")}, "alpha"), ({"beta": 1.1}, "beta"), ({"beta": -0.1}, "beta")])  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings: dict, name: str) -> None:
    with pytest.raises(PlanError, match=name):
        Reuse(**settings)
