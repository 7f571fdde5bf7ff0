"""`run.py train RECIPE`: a file fills in the nodes, and what it gets wrong is said."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from helpers_train import Recorder
from latentmotion.demo import config
from latentmotion.host import demo_models, material, train
from latentmotion.host.video import DEMO_CLIPS
from latentmotion.motion_modules.animatediff.lora import read_motion_lora
from latentmotion.motion_modules.errors import TrainingError
from latentmotion.motion_modules.files import read_metadata, read_weights
from latentmotion.motion_modules.tune_a_video.checkpoint import read_tuned
from latentmotion.nodes import recipe
from latentmotion.training.checkpoint import load_state
from PIL import Image
from safetensors.torch import save_file

DATA = {"width": 32, "height": 32, "caption": "a blue ground"}
SETTINGS = {"file_name": "zoom", "steps": 2, "rank": 2, "frames": 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder with a picture to film and a models folder to write into; the host's own list is put back."""
    (tmp_path / "clips").mkdir()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "clips" / "a.png")
    (tmp_path / "models").mkdir()
    kept = {name: ([*paths], endings) for name, (paths, endings) in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", kept)
    return tmp_path


def written(folder: Path, **changes: object) -> Path:
    """A recipe of the demo models; None leaves an entry out."""
    said = {
        "training": "motion lora", "checkpoint": "demo", "motion_module": str(config.WEIGHTS / config.MOTION_FILE),
        "models": "models", "data": DATA | {"folder": "clips"}, "camera": {"motion": "zoom in", "frames": 3},
        "settings": SETTINGS,
    } | changes  # fmt: skip
    path = folder / "zoom.json"
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return path


def test_a_recipe_is_carried_out(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert recipe.main([str(written(folder))]) == 0
    told = capsys.readouterr().out
    assert "GB of memory besides the models" in told and "step 2 of 2" in told
    made = folder / "models" / "animatediff_motion_lora" / "zoom.safetensors"
    assert read_motion_lora(read_weights(made), "zoom").rank == 2
    assert recipe.main([str(written(folder))]) == 0 and "trained with these settings already" in capsys.readouterr().out


def test_ctrl_c_keeps_the_state(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Interrupted:
        def __init__(self, *args: object) -> None: ...

        def __call__(self, step: int, *args: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "TrainingProgress", Interrupted)
        assert recipe.main([str(written(folder))]) == 130 and "goes on with it" in capsys.readouterr().out
    state = state_of(folder)
    assert state.is_file()
    assert recipe.main([str(written(folder))]) == 0 and not state.exists()


def state_of(folder: Path) -> Path:
    return folder / "models" / "animatediff_motion_lora" / "zoom.safetensors.training"


def end(*given: object, times: int = 1, **more: object) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("times", [1, 2])
def test_no_step_is_lost_that_is_done_when_it_ends(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture, times: int) -> None:  # fmt: skip
    """In the middle of a step, where weights and optimiser do not belong together; two signals at a time are one."""
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *given: object) -> None:
        real(self, *given)
        end(times=times)

    path = written(folder, settings=SETTINGS | {"steps": 9, "save_every": 100})
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert recipe.main([str(path)]) == 130
    assert "What was learned is kept" in capsys.readouterr().out
    assert load_state(state_of(folder))["step"] == 1
    assert recipe.main([str(path)]) == 0 and "step 9 of 9" in capsys.readouterr().out


def test_a_second_one_ends_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                   ) -> None:  # fmt: skip
    def at(step: int) -> None:
        end(times=2)
        pytest.fail("went on")

    monkeypatch.setattr(recipe.files, "TOGETHER", 0.0)
    monkeypatch.setattr(train, "TrainingProgress", Recorder(at))
    assert recipe.main([str(written(folder))]) == 130 and "Stopped at once" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["loading", "reading", "encoding"])
def test_where_nothing_learns_it_ends_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture, place: str) -> None:  # fmt: skip
    def ended(*given: object, **more: object) -> None:
        end()
        pytest.fail("went on")

    owner, name = {"loading": (demo_models, "load_vae"), "reading": (material, "encode_texts"),
                   "encoding": (material, "encode_frames")}[place]  # fmt: skip
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(owner, name, ended)
    assert recipe.main([str(written(folder))]) == 130
    told = capsys.readouterr().out
    assert "Stopped at once" in told and "is kept" not in told and not state_of(folder).exists()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert not comfy.model_management.processing_interrupted()


def test_every_stage_is_a_recipe(folder: Path) -> None:
    small = {"file_name": "made", "steps": 1, "batch_size": 1}
    recipe.carry_out(written(folder, training="domain adapter", camera=None, settings=small | {"rank": 2}))
    loras = {str(folder / "models" / "loras" / "made.safetensors"): 0.5}
    short = small | {"frames": 3, "stride": 1}
    recipe.carry_out(written(folder, training="motion module", loras=loras, settings=short))
    assert (folder / "models" / "animatediff_models" / "made.safetensors").is_file()


def test_a_video_model_is_a_recipe(folder: Path) -> None:
    film = {"video_file": str(DEMO_CLIPS / "latentmotion_toy_clip.mp4"), "width": 32, "height": 32, "frame_cap": 4}
    settings = {"file_name": "tuned", "prompt": "a red circle moves right", "frames": 4, "stride": 1, "steps": 2}
    said = {"training": "video model", "motion_module": None, "data": film, "camera": None, "settings": settings}
    recipe.carry_out(written(folder, **said))
    made = folder / "models" / "animatediff_models" / "tuned.safetensors"
    file = read_tuned(read_weights(made), read_metadata(made), "tuned")
    assert file.base.name == "demo" and file.changes
    for changes, sentence in (({"camera": {"motion": "zoom in"}}, "learns one video as it is"),
                              ({"data": {"video_file": "none.mp4"}}, "video_file in .data. is 'none.mp4'"),
                              ({"data": {}}, "video_file in .data. is ''")):
        with pytest.raises(ValueError, match=sentence):
            recipe.carry_out(written(folder, **said | changes))


def test_toml_is_read(folder: Path) -> None:
    pytest.importorskip("tomllib")
    path = folder / "r.toml"
    path.write_text('training = "motion lora"\ncheckpoint = "demo"\n[settings]\nrank = 8\n')
    file = recipe.files.read_training_file(path)
    assert recipe.filled(recipe.TrainMotionLora, file, "settings")["rank"] == 8
    assert recipe.filled(recipe.TrainMotionLora, file, "settings")["steps"] == 2000
    path.write_text("training = motion lora")
    with pytest.raises(ValueError, match=r"r.toml cannot be read \(.*line 1"):
        recipe.files.read_training_file(path)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"training": "motion"}, "training = 'motion', and there are: motion lora"),
    ({"checkpoint": None}, "does not say checkpoint"),
    ({"checkpoint": "none.ckpt"}, "names none.ckpt, which is neither a file beside it nor one of the checkpoints"),
    ({"motion_module": None}, "names no motion module"),
    ({"model": "x"}, "says model, which no recipe has"),
    ({"models": "nowhere"}, "there is no folder"),
    ({"loras": {"a.safetensors": "one"}}, r"a.safetensors in \[loras\] is 'one', where its strength is needed"),
    ({"loras": {"a.safetensors": float("nan")}}, r"a.safetensors in \[loras\] is nan, where"),
    ({"settings": "fast"}, "settings is 'fast', where a table is needed"),
    ({"settings": {"stepz": 3}}, r"\[settings\] has stepz, which Train MotionLoRA does not have. There are: captions"),
    ({"settings": {"steps": "3"}}, "steps is '3', where int is needed"),
    ({"settings": {"steps": 0}}, "steps is 0, and must lie between 1 and"),
    ({"camera": {"motion": "fly"}}, "motion is 'fly', which is not one of its choices: zoom in"),
    ({"data": {"folder": "empty"}}, "There is no folder"),
])  # fmt: skip
def test_what_a_recipe_gets_wrong_is_said(folder: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.carry_out(written(folder, **changes))


def junk(path: Path) -> str:
    path.write_bytes(b"junk" * 100)
    return str(path)


def other_weights(path: Path) -> str:
    """A whole file of something else."""
    save_file({"layer.weight": torch.zeros(2, 2)}, path)
    return str(path)


FILES: dict[str, tuple[Callable[[Path], dict], str]] = {
    "junk checkpoint": (lambda path: {"checkpoint": junk(path)}, "cannot be loaded as a checkpoint .*Name another"),
    "other checkpoint": (lambda path: {"checkpoint": other_weights(path)}, "cannot be loaded as a checkpoint"),
    "junk VAE": (lambda path: {"vae": junk(path)}, "cannot be loaded as a VAE"),
    "other VAE": (lambda path: {"vae": other_weights(path)}, "holds no VAE"),
    "junk LoRA": (lambda path: {"loras": {junk(path): 1.0}}, "cannot be loaded as a LoRA"),
    "other LoRA": (lambda path: {"loras": {other_weights(path): 1.0}}, "changes nothing: none of its tensors"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_not_what_is_needed_are_named(folder: Path, what: str) -> None:
    (changes, sentence), path = FILES[what], folder / "given.safetensors"
    with pytest.raises(TrainingError, match=f"{path} {sentence}"):
        recipe.carry_out(written(folder, **changes(path)))


def test_a_checkpoint_of_an_image_model_alone_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [demo_models.load_unet(), None, comfy.sd.VAE(sd={}), None]
    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", lambda path: found)
    checkpoint = other_weights(folder / "unet.safetensors")
    with pytest.raises(TrainingError, match=r"unet.safetensors holds no text encoder, .* Name a whole checkpoint"):
        recipe.carry_out(written(folder, checkpoint=checkpoint))
    found[1] = demo_models.load_clip()
    with pytest.raises(TrainingError, match=r"unet.safetensors holds no VAE, .* Name a file of one: vae ="):
        recipe.carry_out(written(folder, checkpoint=checkpoint))


def test_the_command_says_it_and_fails(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert recipe.main([str(folder / "none.toml")]) == 1 and "There is no file" in capsys.readouterr().out
    assert recipe.main([]) == 2 and "Name one recipe" in capsys.readouterr().out
