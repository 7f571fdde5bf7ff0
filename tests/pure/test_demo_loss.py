"""What the demo's motion stages are trained against."""

from __future__ import annotations

import pytest
import torch
from latentmotion.demo import motion
from latentmotion.demo.captions import DIRECTIONS
from latentmotion.demo.latents import Samples
from latentmotion.training.diffusion import alphas_cumprod, noise_error

FRAMES = 6


def _clips(seed: int, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips * FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def _evenly(start: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return (start[:, None] + torch.arange(FRAMES).view(1, -1, 1, 1, 1) * change[:, None]).flatten(0, 1)


def test_what_stays_or_changes_evenly_has_no_differences():
    start, change = _clips(1)[:2], _clips(2)[:2]
    assert motion.differences(_evenly(start, 0 * change), FRAMES, 1).abs().max() == 0
    assert motion.differences(_evenly(start, change), FRAMES, 1).abs().max() > 1
    assert motion.differences(_evenly(start, change), FRAMES, 2).abs().max() < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_differences_of_noise_have_its_deviation_and_never_mix_clips(order: int):
    noise, left = _clips(3, clips=40), FRAMES - order
    found = motion.differences(noise, FRAMES, order)
    assert found.std().item() == pytest.approx(1.0, abs=0.03)
    one = noise.clone()
    one[FRAMES:] = 0.0
    assert torch.equal(motion.differences(one, FRAMES, order)[:left], found[:left])
    assert not motion.differences(one, FRAMES, order)[left:].any()


@pytest.mark.parametrize(("run", "square"), [(motion.ZOOM_IN[2].name, 16 / 6), (motion.ZOOM_OUT[3].name, 4 / 2)])
def test_of_two_errors_of_one_size_the_steady_runs_mind_the_trembling_one_more(run: str, square: float):
    noise, kept = _clips(4), alphas_cumprod("linear")[torch.tensor([100, 400])].repeat_interleave(FRAMES)
    drift = _evenly(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    tremble = drift * torch.tensor([1.0, -1.0]).repeat(FRAMES).view(-1, 1, 1, 1)
    plain = [motion.error_of(noise + e, noise, kept, motion.ZOOM_IN[1].name, FRAMES) for e in (drift, tremble)]
    minded = [motion.error_of(noise + e, noise, kept, run, FRAMES) for e in (drift, tremble)]
    assert torch.equal(plain[0], noise_error(noise + drift, noise, kept, motion.CEILINGS[run]))
    torch.testing.assert_close(plain[0], plain[1])
    torch.testing.assert_close(minded[0], plain[0])
    torch.testing.assert_close(minded[1], plain[1] * (1 + motion.MINDED * square))


class Asked(Exception):
    """Stands for the rest of a step, once its captions are known."""


class Listener:
    def rows(self, texts: list[str], rng: object) -> None:
        raise Asked(texts)


@pytest.mark.parametrize(("recipe", "fewest"), [(motion.ZOOM_OUT[3], 2), (motion.ZOOM_OUT[2], 0)])
def test_the_last_run_of_zoom_out_takes_half_of_its_clips_from_captions_without_a_direction(recipe, fewest: int):
    ways = list(DIRECTIONS)
    moving = [f"a red circle moves {ways[i % 4]} over a blue ground" for i in range(99)]
    texts = ["a red circle over a blue ground", *moving]
    samples = Samples(torch.zeros(len(texts), FRAMES, 4, 8, 8), texts)
    loss_of = motion.clip_loss(None, None, Listener(), samples, recipe, torch.device("cpu"), "linear", {})
    counts = []
    for step in range(8):
        with pytest.raises(Asked) as asked:
            loss_of(step, torch.Generator())
        counts.append(sum("moves" not in text for text in asked.value.args[0]))
    assert min(counts) == fewest and len(asked.value.args[0]) == recipe.batch
