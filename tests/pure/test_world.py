"""The toy world draws what its captions say, inside the frame, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latentmotion.demo import captions, world
from latentmotion.demo.captions import COLOURS, DIRECTIONS, GROUNDS, HELD_OUT, SHAPES, Words, sentences

EVERY = [w for split in ("train", "test", "heldout") for moving in (False, True) for w in sentences(split, moving)]


def _words(rng: np.random.Generator, moving: bool = True) -> Words:
    chosen = [words for words in EVERY if bool(words.direction) == moving]
    return chosen[rng.integers(len(chosen))]


def test_the_splits_share_no_sentence_and_leave_none_out():
    assert len({words.text for words in EVERY}) == len(EVERY)
    pairs = len(COLOURS) * len(GROUNDS) - len(set(COLOURS) & set(GROUNDS))
    assert len(EVERY) == pairs * len(SHAPES) * (1 + len(DIRECTIONS))


def test_held_out_pairs_never_meet_in_training_or_test_sentences():
    for split in ("train", "test"):
        for words in sentences(split, True) + sentences(split, False):
            met = {(words.colour, words.shape), (words.shape, words.direction), (words.colour, words.direction)}
            assert not met & HELD_OUT


def test_every_pair_of_words_of_a_test_sentence_was_seen_in_training():
    def pairs(words: Words) -> set[tuple]:
        said = (words.colour, words.shape, words.ground, words.direction)
        return {(i, j, said[i], said[j]) for i in range(4) for j in range(i)}

    for moving in (False, True):
        seen = set().union(*(pairs(words) for words in sentences("train", moving)))
        for words in sentences("test", moving):
            assert pairs(words) <= seen, words.text


def test_captions_read_as_stated():
    assert Words("red", "circle", "blue", "right").text == "a red circle moves right over a blue ground"
    assert Words("red", "circle", "blue", "right").still().text == "a red circle over a blue ground"


@pytest.mark.parametrize("zoom", [0.0, 1.0, -1.0])
def test_shapes_stay_inside_the_field(zoom: float):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = world.clip(_words(rng), rng, zoom=zoom)
        reach = world.EXTENT * scene.radius[:, None]
        assert (scene.centre - reach >= np.array(world.FIELD[:2]) - 1e-6).all()
        assert (scene.centre + reach <= np.array(world.FIELD[2:]) + 1e-6).all()


def test_the_mark_lies_above_the_field():
    assert world.MARK[3] <= world.FIELD[1]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_goes_where_the_caption_says_at_a_steady_pace(direction: str):
    scene = world.clip(Words("red", "circle", "gray", direction), np.random.default_rng(1))
    steps = np.diff(scene.centre, axis=0)
    assert np.allclose(steps, steps[0])
    length = np.linalg.norm(scene.centre[-1] - scene.centre[0])
    assert world.TRAVEL[0] <= length <= world.TRAVEL[1]
    assert np.allclose(steps[0] / np.linalg.norm(steps[0]), DIRECTIONS[direction])


def test_a_caption_without_direction_makes_a_clip_that_stands():
    scene = world.clip(Words("red", "circle", "gray"), np.random.default_rng(1))
    assert np.ptp(scene.centre, axis=0).max() == 0


def test_a_bent_path_starts_and_ends_on_the_straight_one():
    time = np.linspace(0, 1, 17)
    plain, bent = world.straight("right")(time), world.straight("right", bend=0.3)(time)
    assert np.allclose(plain[[0, -1]], bent[[0, -1]])
    assert np.allclose(np.abs(bent[8] - plain[8]), [0.0, 0.3])


@pytest.mark.parametrize("seed", range(12))
def test_a_curved_path_bends_and_stays_in_the_picture(seed: int):
    rng = np.random.default_rng(seed)
    scene = world.clip(Words("red", "circle", "gray"), rng, path=world.curved(rng))
    ends, middle = (scene.centre[0] + scene.centre[-1]) / 2, scene.centre[[7, 8]].mean(0)
    length = np.linalg.norm(scene.centre[-1] - scene.centre[0])
    assert world.BEND[0] * 0.98 * length <= np.linalg.norm(middle - ends) <= world.BEND[1] * length
    low, high = scene.centre - scene.radius[:, None], scene.centre + scene.radius[:, None]
    assert (low >= world.FIELD[:2]).all() and (high <= world.FIELD[2:]).all()


def test_zoom_magnifies_by_the_stated_amount():
    scene = world.clip(Words("red", "square", "gray", "up"), np.random.default_rng(2), zoom=1.0)
    assert np.isclose(scene.radius[-1] / scene.radius[0], world.ZOOM[1] / world.ZOOM[0])
    back = world.clip(Words("red", "square", "gray", "up"), np.random.default_rng(2), zoom=-1.0)
    assert np.allclose(scene.radius, back.radius[::-1])


def test_same_seed_same_pictures():
    words = Words("red", "cross", "blue", "up")
    first, second = (world.draw(world.clip(words, np.random.default_rng(7))) for _ in range(2))
    assert torch.equal(first, second)


def test_colours_are_exact_inside_and_outside_the_shape():
    for shape in SHAPES:
        scene = world.clip(Words("yellow", shape, "blue", "up"), np.random.default_rng(3), frames=1)
        picture = world.draw(scene)[0]
        x, y = (int(v) for v in scene.centre[0])
        assert torch.allclose(picture[y, x], torch.tensor(COLOURS["yellow"]))
        assert torch.allclose(picture[-1, 0], torch.tensor(GROUNDS["blue"]))
        assert picture.min() >= 0 and picture.max() <= 1


def test_a_window_is_a_cut_out_of_the_whole_picture():
    rng = np.random.default_rng(4)
    scene = world.join([world.still(_words(rng), rng, mark=True) for _ in range(4)])
    whole = world.draw(scene)
    assert torch.allclose(world.draw(scene, (60, 2, 64, 48)), whole[:, 2:50, 60:124])


def test_the_mark_changes_its_place_only():
    rng = np.random.default_rng(5)
    words = _words(rng)
    clean, marked = (world.draw(world.clip(words, np.random.default_rng(6), mark=mark)) for mark in (False, True))
    left, top, right, bottom = world.MARK
    changed = (clean != marked).any(-1).any(0)
    assert changed[top:bottom, left:right].all()
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_stills_with_a_direction_leave_room_ahead():
    """That is how a picture without time can show a direction at all."""
    rng = np.random.default_rng(8)
    places = {d: np.mean([world.still(Words("red", "circle", "gray", d), rng).centre[0] for _ in range(200)], axis=0)
              for d in DIRECTIONS}  # fmt: skip
    assert places["left"][0] - places["right"][0] > 10
    assert places["up"][1] - places["down"][1] > 10


def test_unknown_split_has_no_sentences():
    assert captions.sentences("nothing", moving=True) == []
