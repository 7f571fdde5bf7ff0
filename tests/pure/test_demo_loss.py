"""What the demo's stages are trained against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from latentmotion.demo import motion
from latentmotion.demo.latents import Samples
from latentmotion.demo.phases import Phase, phase_at
from latentmotion.training.diffusion import alphas_cumprod, noise_error
from latentmotion.training.loop import Recipe

FRAMES = 6
PHASES = (Phase(0.25, (700, 1000), 300.0), Phase(1.0, ceiling=2.0))


def test_a_phase_ends_at_its_share_of_the_run():
    found = [phase_at(PHASES, step, 8) for step in range(8)]
    assert found == [PHASES[0]] * 2 + [PHASES[1]] * 6


def test_half_of_the_samples_are_spread_over_the_focus_and_half_over_all_steps():
    for seed in range(20):
        steps = PHASES[0].spread(8, np.random.default_rng(seed))
        everywhere, focused = np.sort(steps[:4]), np.sort(steps[4:])
        assert (everywhere // 250).tolist() == [0, 1, 2, 3]
        assert ((focused - 700) // 75).tolist() == [0, 1, 2, 3]
    assert len(PHASES[0].spread(5, np.random.default_rng(0))) == 5


class Words:
    """Stands for the vocabulary and the text encoder."""

    def rows(self, texts: list[str], rng: object) -> torch.Tensor:
        return torch.zeros(len(texts), 77, dtype=torch.long)


def test_a_step_sees_some_frames_of_a_clip_each_at_its_place_in_time(monkeypatch: pytest.MonkeyPatch):
    latents = torch.arange(FRAMES).float().view(1, -1, 1, 1, 1).expand(3, -1, 4, 8, 8)
    recipe = Recipe("motion", steps=10, batch=2, learning_rate=0.1, frames_seen=3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(motion, "encode", lambda _, rows: rows.float()[..., None])
    monkeypatch.setattr(motion, "add_noise", lambda clean, noise, kept: clean)

    def predict(_: object, noisy: torch.Tensor, steps: torch.Tensor, context: torch.Tensor, at: torch.Tensor):
        assert len(noisy) == len(steps) == len(context) == 6
        assert (steps.view(2, 3) == steps.view(2, 3)[:, :1]).all()
        seen.append((noisy[:, 0, 0, 0].view(2, 3), at))
        return torch.zeros_like(noisy)

    monkeypatch.setattr(motion, "predict", predict)
    samples = Samples(latents, ["a"] * 3)
    device = torch.device("cpu")
    loss_of = motion.clip_loss(None, None, Words(), samples, recipe, device, "linear", lambda at: {"at": at})
    for step in range(10):
        loss_of(step, torch.Generator().manual_seed(step))
    assert all((frames == at.float()).all() and (at.diff() > 0).all() for frames, at in seen)
    assert {place for _, at in seen for place in at.tolist()} == set(range(FRAMES))


def test_half_of_the_clips_of_a_resting_phase_name_no_direction(monkeypatch: pytest.MonkeyPatch):
    texts = ["a red circle moves up over a blue ground"] * 9 + ["a red circle over a blue ground"]
    recipe = Recipe("motion", steps=20, batch=4, learning_rate=0.1, frames_seen=1)
    monkeypatch.setitem(motion.PHASES, "motion", (Phase(0.5), Phase(1.0, resting=True)))
    monkeypatch.setattr(motion, "encode", lambda _, rows: rows.float()[..., None])
    monkeypatch.setattr(motion, "predict", lambda _, noisy, *rest, **options: torch.zeros_like(noisy))
    asked: list[int] = []

    class Listening(Words):
        def rows(self, texts: list[str], rng: object) -> torch.Tensor:
            asked.append(sum("moves" not in text for text in texts))
            return super().rows(texts, rng)

    samples = Samples(torch.zeros(10, FRAMES, 4, 8, 8), texts)
    device = torch.device("cpu")
    loss_of = motion.clip_loss(None, None, Listening(), samples, recipe, device, "linear", lambda at: {})
    for step in range(20):
        loss_of(step, torch.Generator().manual_seed(step))
    assert min(asked[10:]) >= 2 and np.mean(asked[:10]) < 1


def test_frames_in_a_row_are_neighbours():
    rng = np.random.default_rng(0)
    found = [motion._places(FRAMES, 4, True, rng) for _ in range(50)]
    assert {tuple(np.diff(places)) for places in found} == {(1, 1, 1)}
    assert {places[0] for places in found} == {0, 1, 2}


def _clips(seed: int, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips * FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def _evenly(start: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return (start[:, None] + torch.arange(FRAMES).view(1, -1, 1, 1, 1) * change[:, None]).flatten(0, 1)


def test_what_changes_evenly_does_not_bend_and_noise_bends_by_its_deviation():
    assert motion.bending(_evenly(_clips(1)[:2], _clips(2)[:2]), FRAMES).abs().max() < 1e-5
    noise = _clips(3, clips=40)
    found = motion.bending(noise, FRAMES)
    assert found.std().item() == pytest.approx(1.0, abs=0.03)
    one = noise.clone()
    one[FRAMES:] = 0.0
    assert torch.equal(motion.bending(one, FRAMES)[: FRAMES - 2], found[: FRAMES - 2]), "clips never mix"
    assert not motion.bending(one, FRAMES)[FRAMES - 2 :].any()


def test_of_two_errors_of_one_size_a_steady_phase_minds_the_trembling_one_more_where_there_is_little_noise():
    noise, kept = _clips(4), alphas_cumprod("linear")[torch.tensor([100, 400])].repeat_interleave(FRAMES)
    drift = _evenly(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    tremble = drift * torch.tensor([1.0, -1.0]).repeat(FRAMES).view(-1, 1, 1, 1)
    phase = Phase(1.0, ceiling=1.0, steady=5.0)

    def errors(phase: Phase, quiet: list[bool]) -> list[float]:
        found = [motion.error_of(noise + e, noise, kept, phase, torch.tensor(quiet), FRAMES) for e in (drift, tremble)]
        return [error.item() for error in found]

    plain = noise_error(noise + drift, noise, kept, 1.0).item()
    for phase_, quiet in ((replace(phase, steady=0.0), [True, True]), (phase, [False, False])):
        assert errors(phase_, quiet) == pytest.approx([plain, plain])
    assert errors(phase, [True, True]) == pytest.approx([plain, plain * (1 + 5.0 * 16 / 6)], rel=1e-5)
    assert errors(phase, [True, False]) == pytest.approx([plain, plain * (1 + 5.0 * 16 / 6 / 2)], rel=1e-5)


def test_a_focus_lies_in_the_schedule_and_the_last_phase_ends_the_run():
    for phases in motion.PHASES.values():
        assert phases[-1].until == 1.0 and [p.until for p in phases] == sorted(p.until for p in phases)
        assert all(0 <= p.focus[0] < p.focus[1] <= 1000 for p in phases)
