"""Values that come over a link, or from a workflow written by hand: hosts do not look at them, so the nodes do."""

from __future__ import annotations

import math

import pytest
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from latentmotion.host.motion import MotionModule
from motion_runs import Run, apply

pytest_plugins = ["helpers_fixtures"]

OWN_SENTENCES = ("motion_module", "motion_lora", "vae_name", "tuned_model", "video_file")
"""Choices of files, which may lie elsewhere or be missing."""


def outside(item: io.Input) -> list[object]:
    """Values that no widget lets through."""
    if item.get_io_type() == "COMBO":
        return ["no such choice"]
    found = [math.nan] if item.get_io_type() == "FLOAT" else []
    return found + [end + step for end, step in ((item.min, -1), (item.max, 1)) if end is not None]


def test_what_no_widget_lets_through_is_refused_by_name(pack_nodes: dict[str, type]) -> None:
    seen = 0
    for node in pack_nodes.values():
        for item in node.GET_SCHEMA().inputs:
            if item.get_io_type() not in ("INT", "FLOAT", "COMBO") or item.id in OWN_SENTENCES:
                continue
            for value in outside(item):
                with pytest.raises(ValueError, match=f"^{item.id} is .*(must lie between|not one of its choices)"):
                    node.execute(**{item.id: value})
                seen += 1
    assert seen > 200


def test_an_empty_part_of_the_run_is_refused_over_links_too(image: ModelPatcher, module: MotionModule, run_node: Run
                                                             ) -> None:  # fmt: skip
    with pytest.raises(ValueError, match="the motion module would never act"):
        apply(run_node, image, module, start_percent=0.5, end_percent=0.5)
