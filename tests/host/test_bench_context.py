"""What bench/context.py calls a border between windows, and a jump."""

from __future__ import annotations

import pytest
from latentmotion.bench.context import borders, judge, seam_ratio
from latentmotion.demo.captions import Words, sentences
from latentmotion.demo.oracle import Reading
from latentmotion.sampling.windows import WindowPlan, WindowSchedule


def moving(places: list[float], words: Words) -> list[Reading]:
    return [Reading(words.shape, words.colour, words.ground, (x, 50.0), 20.0) for x in places]


def test_borders_are_where_other_windows_take_over() -> None:
    assert borders(WindowPlan(length=8, overlap=2).windows(20), 20) == {6, 8, 12, 14}
    assert borders(WindowPlan(WindowSchedule.BATCHED, length=8).windows(20), 20) == {8, 16}
    assert borders([list(range(5))], 5) == set()


@pytest.mark.parametrize(("places", "ratio"), [
    ([0, 2, 4, 6, 8, 10], 1.0), ([0, 2, 4, 12, 14, 16], 4.0), ([0, 2, 12, 14, 16, 18], 1.0),
])  # fmt: skip
def test_jump_at_a_border_is_compared_with_the_rest(places: list[float], ratio: float) -> None:
    words = sentences("test", True)[0]
    made = [(words, moving(places, words))]
    assert seam_ratio(made[0][1], {3}) == pytest.approx(ratio)
    expected = {"caption_right": 1.0, "seam_ratio": pytest.approx(ratio), "within_bar": float(ratio <= 1.5)}
    assert judge(made, {3}) == expected


def test_a_lost_shape_is_a_jump_and_no_right_frame() -> None:
    words = sentences("test", True)[0]
    readings = moving([0, 2, 4, 6, 8, 10], words)
    readings[3] = Reading(ground=words.ground, fault="no shape")
    found = judge([(words, readings)], {3})
    assert found["caption_right"] == 0.0 and found["seam_ratio"] > 60
    assert seam_ratio([Reading(fault="no shape")] * 6, {3}) > 500, "noise is no steady motion"
