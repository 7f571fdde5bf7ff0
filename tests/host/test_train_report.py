"""What a node shows when its training is over."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfy.model_patcher import ModelPatcher
from helpers_train import Pictures, Recorder, Text
from latentmotion.host import options, progress, train, tune
from latentmotion.host.progress import Report
from latentmotion.training.plot import SIZE, plot
from PIL import Image, ImageChops
from test_train_lora import clip_of_a_moving_edge
from test_tune import WIDGETS

pytest_plugins = ["helpers_train_fixtures"]


def report_of(model: ModelPatcher) -> Report:
    """Of a run of three steps, as the node starts it."""
    how = options.tuning(**WIDGETS | {"steps": 3})
    tune.tune_video_model(model, Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how)
    return how.report


def test_the_report_of_a_run(model: ModelPatcher, folder: Path) -> None:
    report = report_of(model)
    about, last, written = report.lines
    assert re.fullmatch(r"[\d.]+ million numbers learn in about [\d.]+ GB of memory besides the models", about)
    assert re.fullmatch(r"step 3 of 3, loss \d+\.\d{4}", last)
    assert re.fullmatch(rf"written: {re.escape(str(folder / 'edge.safetensors'))}, [\d.]+ MB", written)
    assert report.picture.size == SIZE
    assert ImageChops.difference(report.picture, plot([], 3, last)).getbbox(), "there is a curve"
    again = report_of(model)
    assert again.picture is None, "nothing was trained"
    assert again.lines == [f"trained with these settings already: {folder / 'edge.safetensors'}"]


def test_memory_is_on_the_node_before_the_first_step(model: ModelPatcher, folder: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    recorder = Recorder(lambda step: told.append(f"step {step}"))
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    monkeypatch.setattr(progress, "watching_page", lambda: SimpleNamespace(say=told.append))
    report = report_of(model)
    assert told == [report.lines[0], "step 1", "step 2", "step 3"] and "GB of memory besides the models" in told[0]


@pytest.mark.parametrize("in_graph", [True, False])
def test_the_picture_is_for_the_page(in_graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.folder_paths, "get_temp_directory", lambda: str(tmp_path))
    monkeypatch.setattr(progress, "get_executing_context", lambda: object() if in_graph else None)
    report = Report(["done"], plot([3.0, 2.0, 1.0], 3, "three steps"))
    shown, more = report.shown(), report.shown()
    assert shown["text"] == ["done"]
    if not in_graph:
        assert "images" not in shown and not list(tmp_path.iterdir())
        return
    (file,), (other,) = shown["images"], more["images"]
    assert file["type"] == "temp" and other["filename"] != file["filename"], "the page keeps what it knows by name"
    with Image.open(tmp_path / file["subfolder"] / file["filename"]) as kept:
        assert not ImageChops.difference(kept, report.picture).getbbox()
