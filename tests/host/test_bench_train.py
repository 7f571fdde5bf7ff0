"""What bench/train.py films and calls a motion, and what it says a step of training costs."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import tiny_host
import torch
from helpers_motion import SMALL
from helpers_train import small_module
from latentmotion.bench import layouts
from latentmotion.bench import train as bench
from latentmotion.bench.camera import CAMERAS, Clip, stills
from latentmotion.bench.train_step import estimate_errors, step_figures
from latentmotion.demo import oracle
from latentmotion.host.dataset import STILLS, film_camera
from latentmotion.media.clip import collect_pictures

FRAMES = 6


def filmed(name: str, count: int = 3) -> list[Clip]:
    camera = CAMERAS[name]
    pictures, lines = stills(camera, count, seed=5)
    made, _ = film_camera(pictures, lines, motion=camera.move.value, source=STILLS, frames=FRAMES, clips_each=1,
                          amount=camera.amount, width=128, height=128, seed=0)  # fmt: skip
    return [camera.read(collect_pictures(film.clip)) for film in made.films]


@pytest.mark.parametrize("name", CAMERAS)
def test_a_filmed_still_shows_its_move_and_no_other(name: str) -> None:
    clips = filmed(name)
    assert not [reading.fault for clip in clips for reading in clip if reading.fault]
    for clip in clips:
        held = [clip[0]] * FRAMES
        shown = [other for other, camera in CAMERAS.items() if camera.present(clip, held)]
        assert shown == [name] or (name == "roll" and set(shown) <= {"roll", "pan_left", "pan_right"})
        assert CAMERAS[name].present(clip, [oracle.Reading()] * FRAMES), "a move is told without another clip as well"
        assert not CAMERAS[name].present(held, held) and not CAMERAS[name].present(clip[::-1], held)


def test_what_is_lost_on_the_way_shows_no_move() -> None:
    for name in ("zoom_in", "pan_left", "roll"):
        clip = filmed(name, 1)[0]
        lost = [*clip[:3], oracle.Reading(fault="no shape"), *clip[4:]]
        assert not CAMERAS[name].present(lost, [clip[0]] * FRAMES)


def test_half_of_a_move_is_less_of_it() -> None:
    whole = filmed("zoom_in")
    half, still = [[*clip[:3], *[clip[3]] * 3] for clip in whole], [[clip[0]] * FRAMES for clip in whole]
    found = bench.weaker(CAMERAS["zoom_in"], half, whole, still)
    assert found["half_is_less"] == 1.0 and 0.3 < found["half_over_whole"] < 0.9
    assert bench.weaker(CAMERAS["zoom_in"], whole, half, still)["half_is_less"] == 0.0


def test_sections_that_are_measured_outlive_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(room: object, name: str, args: object) -> dict[str, float]:
        if name == "resume":
            raise MemoryError("no room")
        return {f"train.{name}": 1.0}

    monkeypatch.setattr(bench.Bench, "open", lambda *_: None)
    monkeypatch.setattr(bench, "measure", measure)
    path = tmp_path / "figures.json"
    with pytest.raises(MemoryError):
        bench.main(["--only", "roll", "resume", "--json", str(path)])
    assert json.loads(path.read_text()) == {"train.roll": 1.0}


def test_a_run_is_cancelled_at_its_step() -> None:
    with bench.cancelled_at(2, 4):
        for total, cancelled in ((3, False), (4, True)):
            bar = comfy.utils.ProgressBar(total)
            for done in (1, 2):
                assert not comfy.model_management.processing_interrupted()
                bar.update_absolute(done, preview=())  # with a preview newer hosts report the step at once
            assert comfy.model_management.processing_interrupted() is cancelled
    assert not comfy.model_management.processing_interrupted()


def test_a_step_is_timed_beside_the_plain_network_and_leaves_the_models_alone() -> None:
    models = tiny_host.sd15(**SMALL), small_module()
    before = [tiny_host.weights(model) for model in (models[0], models[1].patcher)]
    found = step_figures(size=64, frames=4, rank=4, rounds=1, models=models)
    assert 1.0 < found["train.step_flops_over_plain"] < 4.0
    assert found["train.step_peak_mib"] > found["train.plain_peak_mib"] > 0
    assert 0.75 < found["train.step_foreseen_over_peak"] < 1.5, "counting FLOPs keeps nothing alive"
    for model, weights in zip((models[0], models[1].patcher), before, strict=True):
        tiny_host.assert_same_weights(model, weights)


def test_the_memory_of_a_step_is_foreseen() -> None:
    errors = estimate_errors(((8, 8, 8), (4, 16, 16)), width=32)
    assert len(errors) == 4
    assert max(map(abs, errors.values())) < 0.25, errors


def test_frames_that_agree_and_frames_that_go_somewhere_are_told_apart() -> None:
    camera = layouts.CAMERA
    pictures, lines = stills(camera, 2, seed=5)
    made, _ = film_camera(pictures, lines, motion=camera.move.value, source=STILLS, frames=FRAMES, clips_each=1,
                          amount=camera.amount, width=128, height=128, seed=0)  # fmt: skip
    moving = [collect_pictures(film.clip) for film in made.films]
    found = layouts.judge(moving)
    assert found["alike"] == found["present"] == 1 and found["slide"] > 16 and found["change"] > 0
    resting = layouts.judge([clip[:1].expand(FRAMES, -1, -1, -1) for clip in moving])
    assert resting["alike"] == 1 and resting["present"] == resting["slide"] == resting["change"] == 0
    mixed = layouts.judge([torch.cat([clip[:3], other[:3]]) for clip, other in zip(moving, moving[::-1], strict=True)])
    assert mixed["alike"] == 0
