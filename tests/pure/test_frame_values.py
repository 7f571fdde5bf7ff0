"""Settings per frame: numbers, lists, masks and the text of a widget."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentmotion.sampling.frame_values import FrameValues, frame_values, parse_frame_values

NUMBERS = st.floats(-10, 10, width=32)


def column(values: FrameValues, frames: int, clips: int = 1) -> list[float]:
    return values.at(range(frames), clips).flatten().tolist()


def test_a_number_stays_a_number() -> None:
    assert frame_values(0.75, None).at(range(8), 2) == 0.75
    assert frame_values(0.0, None).is_zero and not frame_values(0.1, None).is_zero
    assert frame_values(0.0, [1.0]).is_zero and frame_values(1.0, [0.0, 0.0]).is_zero
    assert not frame_values(1.0, [0.0, 0.1]).is_zero


@given(st.lists(NUMBERS, min_size=1, max_size=12), NUMBERS, st.integers(1, 20), st.integers(1, 3))
def test_a_list_is_held_multiplied_and_repeated(values: list[float], number: float, frames: int, clips: int) -> None:
    held = [values[min(i, len(values) - 1)] * number for i in range(frames)]
    assert column(frame_values(number, values), frames, clips) == pytest.approx(held * clips)


def test_frames_of_a_window_are_those_of_the_clip() -> None:
    values = frame_values(2.0, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert values.at([3, 4, 0, 9], 2).flatten().tolist() == [6.0, 8.0, 0.0, 8.0] * 2


def test_shapes() -> None:
    assert frame_values(1.0, [1.0, 2.0]).at(range(4), 3).shape == (12, 1, 1, 1)
    assert frame_values(1.0, torch.rand(6, 5)).at(range(4), 1).shape == (4, 1, 6, 5)
    masks = torch.rand(3, 6, 5)
    found = frame_values(2.0, masks).at(range(5), 2)
    assert found.shape == (10, 1, 6, 5)
    assert torch.equal(found[5:, 0], 2.0 * masks[[0, 1, 2, 2, 2]])


def test_a_single_number_on_the_socket() -> None:
    assert column(frame_values(0.5, 3.0), 2) == [1.5, 1.5]


def test_masks_are_copied_and_copies_shared() -> None:
    """A mask that another node changes later must not change a run; cloning a model must not copy masks."""
    masks = torch.ones(2, 4, 4)
    values = frame_values(1.0, masks)
    masks.zero_()
    assert values.at([0], 1).sum() == 16
    assert copy.deepcopy({"a": values})["a"] is values


@pytest.mark.parametrize("bad", [[], (), torch.zeros(0, 4, 4), torch.zeros(3, 0, 4), torch.zeros(1, 2, 3, 4, 5),
                                 torch.zeros(2, 3, 4, 4)])
def test_wrong_shapes_get_a_sentence(bad: object) -> None:
    with pytest.raises(ValueError, match="The list is empty|Masks of shape .* are needed"):
        frame_values(1.0, bad)


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf], float("-inf"), torch.full((1, 2, 2), math.nan)])
def test_numbers_must_be_finite(bad: object) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        frame_values(1.0, bad)


@pytest.mark.parametrize("bad", [[[1.0], [0.0]], ["a"], [None, 1.0]])
def test_lists_hold_numbers(bad: list) -> None:
    with pytest.raises(ValueError, match="The list holds .* where every value must be a number"):
        frame_values(1.0, bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_number_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=f"{bad} is no ordinary number"):
        frame_values(bad, None)


@pytest.mark.parametrize(("text", "values"), [
    ("0.2, 0.5, 1", [0.2, 0.5, 1.0]),
    ("1", [1.0]),
    (" 1 ,\n2,\n", [1.0, 2.0]),
    ("-1e-1,.5", [-0.1, 0.5]),
    ("0: 0, 4: 1", [0.0, 0.25, 0.5, 0.75, 1.0]),
    ("2: 1, 4: 3", [1.0, 1.0, 1.0, 2.0, 3.0]),
    ("4:1\n0:0", [0.0, 0.25, 0.5, 0.75, 1.0]),
    ("3: 0.5", [0.5] * 4),
    ("", []),
])
def test_text(text: str, values: list[float]) -> None:
    assert parse_frame_values(text) == pytest.approx(values)


@pytest.mark.parametrize(("text", "sentence"), [
    ("0.2, x", '"x" in "0.2, x" cannot be read. Write numbers such as'),
    ("0: 1, 2", '"2" in "0: 1, 2" cannot be read'),
    ("1:2:3", '"1:2:3" in "1:2:3" cannot be read'),
    ("0.5: 1", '"0.5: 1" in "0.5: 1" cannot be read'),
    (":", '":" in ":" cannot be read'),
    ("-1: 2, 3: 1", "Frame -1 is before the first frame"),
    ("2: 1, 2: 0", "Frame 2 has two values"),
    ("0: 1, 99999999999: 0", "Frame 99999999999 is beyond the longest clip"),
])
def test_text_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_frame_values(text)


@given(st.text("0123456789:.,- \nxe", max_size=20))
def test_any_text_gives_numbers_or_a_sentence(text: str) -> None:
    try:
        values = parse_frame_values(text)
    except ValueError as error:
        assert "Frame" in str(error) or "cannot be read" in str(error)
    else:
        assert all(isinstance(value, float) for value in values)


@given(st.dictionaries(st.integers(0, 40), NUMBERS, min_size=1, max_size=6))
def test_keyframes_are_met_and_joined_by_lines(keys: dict[int, float]) -> None:
    values = parse_frame_values(", ".join(f"{frame}: {value!r}" for frame, value in keys.items()))
    assert len(values) == max(keys) + 1
    assert all(values[frame] == pytest.approx(value, abs=1e-6) for frame, value in keys.items())
    inside = [i for i in range(min(keys) + 1, max(keys)) if i not in keys]
    bends = [values[i - 1] - 2 * values[i] + values[i + 1] for i in inside]
    assert all(abs(bend) < 1e-4 for bend in bends)
