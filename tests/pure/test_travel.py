"""Prompt travel: what the lines mean, what is wrong with them, and the share of each prompt in every frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentmotion.sampling.travel import Interpolation, Travel, TravelError, parse_travel

LINES = """
# The way there
  8: a red circle, (bright:1.2)
0 :a blue square

   # and back
16:a blue square
"""
WORDS = st.sampled_from(["red", "green", "blue", "a: b", "#1"])
LINE = st.tuples(st.integers(0, 40), st.sampled_from([0.25, 1.0, 3.0]), WORDS)


def shares(travel: Travel, frame: int) -> list[float]:
    return travel.weights([frame])[0].tolist()


def test_lines_are_read_in_any_order_and_prompts_kept_once() -> None:
    travel = parse_travel(LINES)
    assert travel.prompts == ("a blue square", "a red circle, (bright:1.2)")
    assert [key.frame for key in travel.keyframes] == [0, 8, 16]


def test_text_goes_round_every_prompt() -> None:
    travel = parse_travel("0: circle\n8: square", before=" a red ", after=", moving")
    assert travel.prompts == ("a red circle , moving", "a red square , moving")


@pytest.mark.parametrize(("kind", "quarter"), [
    (Interpolation.LINEAR, 0.25), (Interpolation.EASED, 0.15625), (Interpolation.HOLD, 0.0),
])  # fmt: skip
def test_what_lies_between_two_keyframes(kind: Interpolation, quarter: float) -> None:
    travel = parse_travel("4: a\n12: b", kind)
    assert shares(travel, 6) == [1 - quarter, quarter]
    middle = 0.0 if kind is Interpolation.HOLD else 0.5
    assert shares(travel, 8) == [1 - middle, middle]
    assert [shares(travel, frame) for frame in (0, 4, 12, 10**8)] == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_weights_are_relative_to_the_other_lines_of_the_frame() -> None:
    travel = parse_travel("0: a\n8 * 3: a\n8*1 : b\n16 * 0.2: b")
    assert [shares(travel, frame) for frame in (0, 8, 12, 16)] == [[1, 0], [0.75, 0.25], [0.375, 0.625], [0, 1]]


def test_a_prompt_between_itself_is_itself() -> None:
    travel = parse_travel("0: a\n7: a\n9: b", Interpolation.EASED)
    assert {tuple(shares(travel, frame)) for frame in range(8)} == {(1.0, 0.0)}


@given(st.lists(LINE, min_size=1, max_size=8), st.sampled_from(Interpolation))
def test_shares_are_a_mixture_and_never_jump_but_by_hold(lines: list[tuple], kind: Interpolation) -> None:
    travel = parse_travel("\n".join(f"{frame} * {weight}: {words}" for frame, weight, words in lines), kind)
    weights = travel.weights(range(50))
    assert weights.shape == (50, len(travel.prompts)) and bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64))
    keys = {frame for frame, _, _ in lines}
    apart = min((b - a for a, b in zip(sorted(keys), sorted(keys)[1:], strict=False)), default=50)
    steps = weights.diff(dim=0).abs().amax(1)
    if kind is Interpolation.HOLD:
        assert {frame for frame in range(1, 50) if steps[frame - 1]} <= keys
    else:
        assert bool((steps <= 1.5 / apart + 1e-9).all())
    torch.testing.assert_close(weights[[7, 3, 7]], travel.weights([7, 3, 7]))
    for key in travel.keyframes:
        assert dict(enumerate(shares(travel, key.frame))) == pytest.approx(
            {number: dict(key.shares).get(number, 0.0) for number in range(len(travel.prompts))}
        )


@given(st.text(max_size=60))
def test_any_text_is_a_travel_or_an_error_that_says_where(text: str) -> None:
    try:
        travel = parse_travel(text)
    except TravelError as error:
        assert str(error).startswith(("Line ", "There is no prompt"))
    else:
        assert travel.prompts and travel.table()


@pytest.mark.parametrize(("text", "line", "what"), [
    ("0: a\na blue square", 2, 'has no colon'),
    ("# x\n\nframe 8: a", 3, '"frame 8"'),
    ("0: a\n-8: b", 2, '"-8"'),
    ("8.5: b", 1, '"8.5"'),
    ("0: a\n²: b", 2, "no frame number"),
    ("9999999999: b", 1, "no frame number"),
    (": b", 1, "no frame number"),
    ("0: a\n8:  ", 2, "no prompt behind frame 8"),
    ("0 * 0: a", 1, 'weight "0"'),
    ("0 * -1: a", 1, 'weight "-1"'),
    ("0 * nan: a", 1, 'weight "nan"'),
    ("0 * inf: a", 1, 'weight "inf"'),
    ("0 *: a", 1, 'weight ""'),
    ("0 * half: a", 1, 'weight "half"'),
])  # fmt: skip
def test_errors_name_the_line_and_the_fault(text: str, line: int, what: str) -> None:
    with pytest.raises(TravelError, match=f"^Line {line}") as found:
        parse_travel(text)
    assert what in str(found.value) and "24: a red circle" in str(found.value)


@pytest.mark.parametrize("text", ["", "\n  \n", "# 0: a red circle"])
def test_a_travel_without_prompts_is_refused(text: str) -> None:
    with pytest.raises(TravelError, match="no prompt"):
        parse_travel(text)


def test_table() -> None:
    travel = parse_travel("4: a\n12: b\n12 * 3: a\n13: c\n20: c")
    assert travel.table().splitlines() == [
        "frames  prompts",
        "0-4     100% [1]",
        "5-11    100% [1] -> 75% [1] + 25% [2], linear",
        "12      75% [1] + 25% [2]",
        "13-19   100% [3]",
        "20 on   100% [3]",
        "",
        "[1] a",
        "[2] b",
        "[3] c",
    ]


def test_table_of_held_prompts() -> None:
    assert parse_travel("0: a\n1: b\n16: a", Interpolation.HOLD).table().splitlines()[:4] == [
        "frames  prompts", "0       100% [1]", "1-15    100% [2]", "16 on   100% [1]",
    ]  # fmt: skip
