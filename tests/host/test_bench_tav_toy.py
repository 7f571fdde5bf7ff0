"""What bench/tav_toy.py calls a right edit, a kept path, and drift: read off clips that are drawn, not sampled."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latentmotion.bench import tav_toy
from latentmotion.bench.tav_toy import KINDS, Edit, Source, figures_of, judge, named, source
from latentmotion.demo import world
from latentmotion.demo.captions import Words, sentences


@pytest.fixture
def clip() -> Source:
    nothing = SimpleNamespace(encode=lambda pictures: torch.zeros(len(pictures), 4, 16, 16))
    return source(SimpleNamespace(vae=nothing), 3)


def drawn(clip: Source, words: Words, path: np.ndarray, radius: float = 16.0) -> torch.Tensor:
    """The caption's shape on a way of our own. Shapes: path (f, 2) -> (f, h, w, 3)."""
    scene = world.clip(words, np.random.default_rng(0), frames=len(path))
    return world.draw(replace(scene, centre=path, radius=np.full(len(path), radius)))


def test_a_source_is_curved_and_each_edit_changes_one_word(clip: Source):
    known = {words.text for split in ("train", "test") for words in sentences(split, False)}
    assert list(clip.edits) == list(KINDS) and len(clip.pictures) == world.FRAMES
    for kind, words in clip.edits.items():
        assert {name for name in KINDS if getattr(words, name) != getattr(clip.words, name)} == {kind}
        assert words.text in known and words.direction is None
    steps = np.diff(clip.path, axis=0)
    assert np.linalg.norm(np.diff(steps, axis=0), axis=1).min() > 0


def test_a_perfect_edit(clip: Source):
    words = clip.edits["colour"]
    found = figures_of([judge(drawn(clip, words, clip.path), words, clip)])
    assert found["edit_right"] == found["frames_right"] == found["path_near"] == 1
    assert found["path_rmse"] < 1e-3 and found["jerk"] < 1e-3 and found["motion_kept"] == pytest.approx(1, abs=0.01)
    assert found["size_drift"] < 0.01 and found["colour_drift"] < 0.01


def test_another_way_is_seen(clip: Source):
    words, inward = clip.edits["shape"], np.sign(64 - clip.path.mean(0)) * [3.0, 4.0]
    aside = figures_of([judge(drawn(clip, words, clip.path + inward, 14), words, clip)])
    assert aside["edit_right"] == 1 and aside["path_near"] == 0
    assert aside["path_rmse"] == pytest.approx(5 / 128, rel=0.02) and aside["motion_kept"] == pytest.approx(1, abs=0.02)
    still = np.tile(clip.path.mean(0), (world.FRAMES, 1))
    stalled = figures_of([judge(drawn(clip, words, still), words, clip)])
    assert stalled["motion_kept"] == pytest.approx(0, abs=0.01)
    shaken = still + np.where(np.arange(len(still)) % 2, 2.0, -2.0)[:, None]
    assert figures_of([judge(drawn(clip, words, shaken), words, clip)])["jerk"] > 8 / 128 > 8 * stalled["jerk"]


def test_one_frame_without_the_shape_is_no_edit(clip: Source):
    words = clip.edits["ground"]
    pictures = drawn(clip, words, clip.path)
    pictures[5] = pictures[5, 0, 0]
    found = figures_of([judge(pictures, words, clip)])
    assert found["edit_right"] == found["path_near"] == 0 and found["frames_right"] == pytest.approx(15 / 16)
    assert found["path_rmse"] < 1e-3, "of the frames that have one"
    assert figures_of([judge(clip.pictures, words, clip)])["edit_right"] == 0, "the source is no edit"


def test_figures_of_parts_stand_beside_the_method_on_the_same_clips():
    def edit(right: bool) -> Edit:
        return Edit(np.full(16, right), np.zeros((16, 2)), np.ones(16), np.zeros((16, 6)), 1.0)

    full = [(kind, edit(number > 0)) for number in range(2) for kind in KINDS]
    found = named({"full": full, "without_tuning": [(kind, edit(True)) for kind in KINDS]})
    assert found["tav.edit_right"] == found["tav.ground.edit_right"] == 0.5
    assert found["tav.with_all.edit_right"] == 0 and found["tav.without_tuning.edit_right"] == 1
    assert tav_toy.PARTS == ("without_inversion", "without_tuning", "without_st_attn")
