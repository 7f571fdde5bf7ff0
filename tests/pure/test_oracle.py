"""The oracle reads what the world draws, nearly always, and refuses what it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latentmotion.demo import oracle, world
from latentmotion.demo.captions import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Words, sentences

EVERY = [w for split in ("train", "test", "heldout") for moving in (False, True) for w in sentences(split, moving)]


def _drawn(count: int, seed: int) -> tuple[list[Words], world.Scene]:
    rng = np.random.default_rng(seed)
    words = [EVERY[i] for i in rng.integers(len(EVERY), size=count)]
    return words, world.join([world.still(w, rng, mark=bool(rng.integers(2))) for w in words])


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_reads_drawn_pictures(noise: float):
    words, scene = _drawn(200, seed=1)
    pictures = world.draw(scene)
    pictures = (pictures + noise * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    readings = oracle.read(pictures)
    right = [r.shows(w) and r.mark == m for r, w, m in zip(readings, words, scene.mark, strict=True)]
    assert np.mean(right) >= 0.99
    error = [np.abs(np.array(r.centre) - c).max() for r, c, ok in zip(readings, scene.centre, right, strict=True) if ok]
    assert max(error) < 0.5


def test_reads_soft_edges():
    words, scene = _drawn(100, seed=2)
    pictures = world.draw(scene).permute(0, 3, 1, 2)
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    readings = oracle.read(soft.permute(0, 2, 3, 1))
    assert np.mean([r.shows(w) for r, w in zip(readings, words, strict=True)]) >= 0.99


def test_every_word_is_told_from_every_other():
    scene = world.clip(Words("red", "circle", "black", "right"), np.random.default_rng(0), frames=1)
    for shape in SHAPES:
        for colour in COLOURS:
            for ground in GROUNDS:
                if colour == ground:
                    continue
                words = Words(colour, shape, ground)
                drawn = world._scene(words, scene.centre, scene.radius, mark=False)
                reading = oracle.read(world.draw(drawn))[0]
                assert reading.shows(words), (words.text, reading)
                others = [w for w in EVERY if not w.direction and w.text != words.text]
                assert not any(reading.shows(other) for other in others)


RED_CIRCLE = Words("red", "circle", "gray")


def _picture(words: Words = RED_CIRCLE, centre=(64.0, 70.0), radius=18.0) -> torch.Tensor:
    return world.draw(world._scene(words, np.array([centre]), np.array([radius]), mark=False))


def _two_shapes() -> torch.Tensor:
    left, right = _picture(centre=(30.0, 70.0)), _picture(Words("red", "square", "gray"), centre=(95.0, 70.0))
    ground = torch.tensor(GROUNDS["gray"])
    return torch.where((right - ground).abs().sum(-1, keepdim=True) > 1e-4, right, left)


def _two_colours() -> torch.Tensor:
    picture = _picture()
    blue = _picture(Words("blue", "circle", "gray"))
    return torch.cat([picture[:, :, :64], blue[:, :, 64:]], dim=2)


def _gradient() -> torch.Tensor:
    return torch.linspace(0, 1, 128)[None, None, :, None].expand(1, 128, 128, 3).contiguous()


def _half_faded() -> torch.Tensor:
    return (_picture() - torch.tensor(GROUNDS["gray"])) * 0.4 + torch.tensor(GROUNDS["gray"])


def _blob() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    alpha = torch.exp(-(((x - 64) / 16) ** 2 + ((y - 70) / 30) ** 2))[..., None]
    return (torch.tensor(GROUNDS["gray"]) * (1 - alpha) + torch.tensor(COLOURS["red"]) * alpha)[None]


def _speckled() -> torch.Tensor:
    picture = _picture()
    spots = torch.rand(1, 128, 128, 1, generator=torch.Generator().manual_seed(1)) < 0.05
    return torch.where(spots, torch.zeros(()), picture)


GARBAGE = {
    "noise": torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0)),
    "black": torch.zeros(1, 128, 128, 3),
    "plain ground": torch.tensor(GROUNDS["blue"]).expand(1, 128, 128, 3),
    "orange shape": world.draw(world.Scene(np.array([0]), np.array([[1.0, 0.5, 0.0]]), np.array([GROUNDS["gray"]]),
                                           np.array([[64.0, 70.0]]), np.array([18.0]), np.array([False]))),
    "pink ground": world.draw(world.Scene(np.array([0]), np.array([COLOURS["red"]]), np.array([[1.0, 0.7, 0.8]]),
                                          np.array([[64.0, 70.0]]), np.array([18.0]), np.array([False]))),
    "two shapes": _two_shapes(),
    "two colours in one shape": _two_colours(),
    "gradient": _gradient(),
    "half faded": _half_faded(),
    "blob": _blob(),
    "speckled": _speckled(),
    "ring": world.draw(world._scene(Words("red", "circle", "gray"), np.array([[64.0, 70.0]]), np.array([20.0]), False))
    - world.coverage(np.array([0]), np.array([[64.0, 70.0]]), np.array([12.0]), (0, 0, 128, 128))[..., None]
    * (torch.tensor(COLOURS["red"]) - torch.tensor(GROUNDS["gray"])),
    "not a number": torch.full((1, 128, 128, 3), float("nan")),
}  # fmt: skip


@pytest.mark.parametrize("name", GARBAGE)
def test_refuses_garbage(name: str):
    reading = oracle.read(GARBAGE[name])[0]
    assert reading.fault, reading
    assert not any(reading.shows(words) for words in EVERY)


def test_refuses_other_sizes():
    with pytest.raises(ValueError, match="128"):
        oracle.read(torch.zeros(1, 64, 64, 3))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reads_the_way_of_a_clip(direction: str):
    clip = world.clip(Words("white", "square", "green", direction), np.random.default_rng(1), mark=True)
    found, straightness = oracle.path(oracle.read(world.draw(clip)))
    assert found == direction
    assert straightness > 0.999


def test_no_way_is_read_from_a_standing_or_a_shuffled_clip():
    standing = oracle.read(world.draw(world.clip(Words("white", "square", "green"), np.random.default_rng(1))))
    assert oracle.path(standing)[0] is None
    moving = oracle.read(world.draw(world.clip(Words("white", "square", "green", "up"), np.random.default_rng(1))))
    shuffled = [moving[i] for i in np.random.default_rng(0).permutation(len(moving))]
    assert oracle.path(shuffled)[1] < 0.5


def test_a_path_with_an_unreadable_frame_counts_as_none():
    clip = world.draw(world.clip(Words("white", "square", "green", "up"), np.random.default_rng(1)))
    clip[5] = 0.0
    assert oracle.path(oracle.read(clip)) == (None, 0.0)


def test_a_bent_path_is_less_straight_than_a_straight_one():
    words = Words("white", "square", "green", "right")
    bent = world.clip(words, np.random.default_rng(1), path=world.straight("right", bend=0.4))
    assert oracle.path(oracle.read(world.draw(bent)))[1] < 0.95


@pytest.mark.parametrize("growing", [True, False])
def test_zoom_is_read(growing: bool):
    words = Words("purple", "cross", "black", "left")
    clip = world.clip(words, np.random.default_rng(3), zoom=1.0 if growing else -1.0)
    readings = oracle.read(world.draw(clip))
    assert oracle.monotonic(readings, growing)
    assert not oracle.monotonic(readings, not growing)


def test_a_clip_of_one_size_does_not_zoom():
    words = Words("purple", "cross", "black", "left")
    readings = oracle.read(world.draw(world.clip(words, np.random.default_rng(3))))
    assert not oracle.monotonic(readings, True) and not oracle.monotonic(readings, False)
    grown = oracle.read(world.draw(world.clip(words, np.random.default_rng(3), zoom=1.0)))
    swapped = [*grown[:5], grown[9], *grown[6:9], grown[5], *grown[10:]]
    assert not oracle.monotonic(swapped, True)


@pytest.mark.parametrize("shape", ["square", "triangle", "cross"])
def test_turned_outlines_are_read_where_they_are_looked_for(shape: str):
    alpha = world.coverage(np.array([SHAPES.index(shape)]), np.array([[60.0, 66.0]]), np.array([18.0]),
                           (0, 0, world.SIZE, world.SIZE), turn=0.3)[0]  # fmt: skip
    ground, colour = torch.tensor(GROUNDS["blue"]), torch.tensor(COLOURS["red"])
    picture = (ground + alpha[..., None] * (colour - ground))[None]
    (turned,) = oracle.read(picture, turns=(-0.3, 0.0, 0.3))
    assert (turned.shape, turned.turn, turned.fault) == (shape, 0.3, "")
    (upright,) = oracle.read(picture)
    assert upright.turn == 0.0 and (upright.fault or upright.shape == shape)
