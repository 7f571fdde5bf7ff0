"""What a run learns from, what it says of its memory beforehand, and what it draws of its losses."""

from __future__ import annotations

import pytest
import torch
from latentmotion.motion_modules.animatediff.lora import published_key, read_motion_lora
from latentmotion.training.attention import over_frames
from latentmotion.training.clips import EMPTY, Clips, stratified
from latentmotion.training.diffusion import euler
from latentmotion.training.estimate import Layer, run_bytes
from latentmotion.training.likeness import Likeness, alike
from latentmotion.training.plot import MEAN, SIZE, means, plot, under
from PIL import Image, ImageColor
from torch import nn


def numbered(*lengths: int, **settings: object) -> Clips:
    """Clips whose frames hold 100 * clip + frame."""
    latents = tuple(torch.arange(n).view(n, 1, 1, 1).expand(n, 4, 2, 2) + 100.0 * i for i, n in enumerate(lengths))
    return Clips(latents, tuple(f"clip {i}" for i in range(len(lengths))), **settings)


def test_cuts_are_neighbours_of_one_clip_with_its_caption():
    clips = numbered(9, 5, frames=3, stride=2, drop=0.0)
    generator, starts = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        latents, captions = clips.draw(2, generator)
        assert latents.shape == (6, 4, 2, 2)
        for rows, caption in zip(latents[:, 0, 0, 0].view(2, 3).tolist(), captions, strict=True):
            assert rows == [rows[0], rows[0] + 2, rows[0] + 4]
            assert caption == f"clip {int(rows[0] // 100)}"
            starts.add(rows[0])
    assert starts == {0.0, 1.0, 2.0, 3.0, 4.0, 100.0}


def test_captions_are_dropped_as_often_as_asked():
    clips, generator = numbered(3, frames=3, drop=0.25), torch.Generator().manual_seed(0)
    dropped = [caption == EMPTY for _ in range(20) for caption in clips.draw(40, generator)[1]]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.05)


def test_a_likeness_tells_pictures_apart_and_not_how_they_were_rounded():
    def numbers(*parts: torch.Tensor) -> tuple[float, ...]:
        likeness = Likeness()
        for part in parts:
            likeness.add(part)
        return likeness.numbers()

    generator = torch.Generator().manual_seed(0)
    film = torch.rand(200, 40, 30, 3, generator=generator)
    rounded = film + 1e-5 * torch.randn(film.shape, generator=generator)
    assert numbers(film) == numbers(film[:70], film[70:]) and alike(numbers(film), numbers(rounded))
    cut, swapped, recoloured = film.clone(), film.clone(), film.clone()
    cut[150] = film[10]
    swapped[[3, 4]] = film[[4, 3]]
    recoloured[20, 10:20, 10:20] = film[20, 10:20, 10:20].flip(-1)
    others = (film[:-1], cut, swapped, recoloured, film.roll(1, dims=2), torch.zeros_like(film))
    assert not any(alike(numbers(film), numbers(other)) for other in others)
    assert not alike(numbers(film), numbers(film * float("nan"))) and not alike((), numbers(film))


def test_a_likeness_tells_brightness_apart_and_not_how_it_was_rounded():
    def numbers(rows: torch.Tensor) -> tuple[float, ...]:
        likeness = Likeness()
        likeness.add(rows)
        return likeness.numbers()

    film = torch.rand(20, 40, 30, 3, generator=torch.Generator().manual_seed(0))
    black, grey = torch.zeros_like(film), torch.full_like(film, 0.9)
    words = 30 * torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    for rows in (film, grey, words):
        for factor in (0.6, 0.99, 1.01):
            assert not alike(numbers(rows), numbers(rows * factor)), factor
        assert alike(numbers(rows), numbers(rows.half()))
        assert alike(numbers(rows)[-1:], numbers(rows.bfloat16())[-1:]), "not the size, at least"
    assert alike(numbers(black), numbers(-black)) and not alike(numbers(black), numbers(black + 0.004))


def test_levels_cover_the_schedule_evenly():
    levels = stratified(8, 1000, torch.Generator().manual_seed(0))
    assert (levels // 125).tolist() == list(range(8))
    assert stratified(1, 10, torch.Generator()).shape == (1,)


def test_computing_twice_is_estimated_to_need_a_fraction():
    layers = [Layer("residual", 320, 4096), Layer("transformer", 320, 4096), Layer("motion", 320, 4096)] * 4
    once, twice = (run_bytes(0, layers, images=16, item=2, recompute=again) for again in (False, True))
    assert twice < once / 4
    assert run_bytes(1000, [], images=1, item=4, recompute=True) == 20000
    assert run_bytes(1000, [], images=1, item=4, recompute=True, optimiser="Muon") == 16000


def test_attention_over_frames_is_attention():
    q, k, v = torch.randn(3, 5, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(over_frames(q, k, v), nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_published_keys_are_read_back():
    layer = "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1."
    for name, written in (("to_q", "processor.to_q_lora"), ("to_out.0", "processor.to_out_lora")):
        key = published_key(layer + name)
        assert key == layer + written
        pair = {f"{key}.down.weight": torch.ones(2, 3), f"{key}.up.weight": torch.ones(3, 2)}
        assert list(read_motion_lora(pair, "x").parts) == [f"{layer}{name}.weight"]


def test_the_plot_falls_where_the_losses_fall():
    assert means([4.0, 2.0, 1.0, 1.0], 2) == [3.0, 1.0] and means([], 5) == []
    picture = plot([1.0 - i / 100 for i in range(100)], 200, "step 100 of 200")
    curve = [(x, y) for x in range(picture.width) for y in range(picture.height)
             if picture.getpixel((x, y)) == ImageColor.getrgb(MEAN)]  # fmt: skip
    left, right = min(curve), max(curve)
    assert left[1] < right[1]  # downwards
    assert right[0] < 0.6 * picture.width  # half of the steps are done
    assert plot([], 10, "").size == picture.size and plot([float("nan")] * 3, 10, "").size == picture.size


def test_a_strip_goes_under_the_plot():
    picture, strip = plot([], 10, ""), Image.new("RGB", (SIZE[0], 30), "red")
    assert under(picture, None) is picture
    both = under(picture, strip)
    assert both.size == (SIZE[0], SIZE[1] + 30) and both.getpixel((5, SIZE[1] + 5)) == (255, 0, 0)


def test_following_the_noise_down_ends_at_the_picture():
    """A normal distribution of variance 1: its best guess is x / (1 + sigma^2), its path x / sqrt(1 + sigma^2)."""
    start = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 10
    sigmas = torch.cat([torch.logspace(1, -2, 400), torch.zeros(1)])
    found = euler(lambda x, sigma: x / (1 + sigma**2), start, sigmas)
    assert torch.allclose(found, start / 101**0.5, rtol=0.02)
    assert torch.allclose(euler(lambda x, sigma: torch.ones_like(x), start, sigmas), torch.ones(1), atol=1e-5)
