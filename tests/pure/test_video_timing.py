"""Which frames of a file are taken, and when they are shown."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmotion.media.timing import Selection, file_rate, select

NTSC = Fraction(30000, 1001)


def times_at(rate: Fraction, frames: int, unit: float = 0.001) -> np.ndarray:
    """Stamps of a constant rate, rounded to the unit of the container."""
    return np.round(np.arange(frames) / float(rate) / unit) * unit


def taken(times: np.ndarray, rate: Fraction, end: float | None = None, **wanted: object) -> tuple[list[int], Fraction]:
    indices, out = select(times, len(times) / float(rate) if end is None else end, [rate], Selection(**wanted))
    return indices.tolist(), out


@pytest.mark.parametrize("wanted", [{}, {"frame_rate": Fraction(2997, 100)}, {"frame_rate": NTSC}])
def test_a_constant_rate_is_kept(wanted: dict) -> None:
    """29.97 means the exact rate of the file."""
    assert taken(times_at(NTSC, 100), NTSC, **wanted) == ([*range(100)], NTSC)


@pytest.mark.parametrize(("target", "expected"), [
    (15, [0, 2, 4, 6, 8, 10]),
    (60, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]),
    (24, [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]),
])  # fmt: skip
def test_other_rates_leave_out_and_repeat(target: int, expected: list[int]) -> None:
    """Also where stamps are whole milliseconds, as in webm."""
    for unit in (1e-6, 1e-3):
        assert taken(times_at(Fraction(30), 12, unit), Fraction(30), frame_rate=Fraction(target))[0] == expected


def test_skip_every_nth_and_cap_count_resampled_frames() -> None:
    found = taken(times_at(Fraction(30), 60), Fraction(30), frame_rate=Fraction(15), skip=2, every_nth=3, cap=4)
    assert found == ([4, 10, 16, 22], Fraction(5))


def test_a_variable_rate_is_resampled_by_time() -> None:
    """Two frames a tenth apart, one that stays a second, three at a twentieth: each is shown when it was."""
    times = np.array([0.0, 0.1, 1.1, 1.15, 1.2])
    rate, constant = file_rate(times, [Fraction(5)])
    assert not constant and rate == Fraction(10, 3)
    assert taken(times, Fraction(5), 1.25, frame_rate=Fraction(10))[0] == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]


def test_a_wrong_named_rate_is_not_believed() -> None:
    assert file_rate(times_at(Fraction(25), 50), [Fraction(90000), NTSC]) == (Fraction(25), True)


def test_one_frame() -> None:
    assert taken(np.array([0.0]), Fraction(25)) == ([0], Fraction(25))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 80), st.sampled_from([Fraction(24), NTSC, Fraction(60)]), st.integers(1, 60), st.integers(0, 30),
       st.integers(1, 5), st.integers(0, 30))  # fmt: skip
def test_every_selection_is_in_order_and_in_time(
    frames: int, rate: Fraction, target: int, skip: int, nth: int, cap: int
) -> None:
    times = times_at(rate, frames)
    end = frames / float(rate)
    indices, out = select(times, end, [rate], Selection(Fraction(target), skip, nth, cap))
    assert (np.diff(indices) >= 0).all() and ((0 <= indices) & (indices < frames)).all()
    assert out == Fraction(target, nth) and (not cap or len(indices) <= cap)
    shown = (np.arange(len(indices)) * nth + skip) / target
    assert (np.abs(times[indices] - shown) < 1 / float(rate) + 0.25 / target + 0.001).all()


@pytest.mark.parametrize("wrong", [{"skip": -1}, {"every_nth": 0}, {"cap": -1}, {"frame_rate": Fraction(-1)}])
def test_impossible_selections_are_sentences(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*must be"):
        Selection(**wrong)
