"""The picture of windows that the canvas asks for."""

from __future__ import annotations

import pytest
from latentmotion.host.routes import SHOWN_WINDOWS, plan_picture

WIDGETS = {
    "context_length": "8",
    "context_overlap": "2",
    "schedule": "standard static",
    "context_stride": "1",
    "closed_loop": "false",
    "fuse": "pyramid",
    "noise": "independent",
    "frames": "20",
}


def test_picture_shows_every_frame_and_its_weight() -> None:
    picture = plan_picture(WIDGETS)
    assert [row[0][0] for row in picture["windows"]] == [0, 6, 12]
    assert {frame for row in picture["windows"] for frame, _ in row} == set(range(20))
    assert max(weight for row in picture["windows"] for _, weight in row) == 1.0
    assert picture["more"] == 0


def test_long_clips_are_shown_in_part() -> None:
    picture = plan_picture(WIDGETS | {"frames": "4000"})
    assert len(picture["windows"]) == SHOWN_WINDOWS and picture["more"] > 500


@pytest.mark.parametrize("change", [{"context_overlap": "8"}, {"schedule": "spiral"}, {"frames": "0"}, {"fuse": ""}])
def test_lengths_that_make_no_plan_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        plan_picture(WIDGETS | change)
