"""Training in graphs, through the host's own validation and executor, with the demo's text encoder and VAE."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import films
import folder_paths
import pytest
import safetensors.torch
import tiny_host
import torch
from helpers_motion import SMALL, SMALL_WIDTHS, motion_spec, motion_weights
from helpers_train import WIDGETS, Recorder
from latentmotion.demo import config
from latentmotion.host import material, train
from latentmotion.motion_modules.animatediff.publish import published
from latentmotion.motion_modules.files import read_weights

FRAMES, SIZE, NAME = 4, 32, "graph_learned"
APPLY = {
    "strength": 1.0, "motion_scale": 1.0, "start_percent": 0.0, "end_percent": 1.0, "frames": 0,
    "noise_schedule": "as trained", "positions": "as trained", "group_norm": "as trained",
}  # fmt: skip
LEARNING = WIDGETS | {"file_name": NAME, "steps": 3, "batch_size": 1, "rank": 2, "frames": FRAMES}
Graph = dict[str, dict]


def node(class_type: str, **inputs: Any) -> dict:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def learned(pack_nodes: dict, core_nodes: dict, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the graphs write to; a small image model for the demo's text encoder and VAE, and its motion module."""
    model = tiny_host.sd15(context_dim=config.TEXT_WIDTH, **SMALL)

    class TinyModel:
        FUNCTION, RETURN_TYPES, CATEGORY = "run", ("MODEL",), "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def run(self) -> tuple:
            return (model,)

    monkeypatch.setitem(core_nodes, "TinyModel", TinyModel)
    folder = Path(folder_paths.get_folder_paths("animatediff_motion_lora")[0])
    module = Path(folder_paths.get_folder_paths("animatediff_models")[0], f"{NAME}.safetensors")
    module.parent.mkdir(parents=True, exist_ok=True)
    spec = motion_spec(SMALL_WIDTHS, 1)
    safetensors.torch.save_file(published(spec, motion_weights(spec)), module)
    yield folder / f"{NAME}.safetensors"
    for path in (*folder.glob(f"{NAME}.safetensors*"), module):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def video(base_directory: Path) -> Iterator[Path]:
    """A bright bar that crosses a dark ground, in the input folder."""
    columns = torch.arange(SIZE).view(1, 1, SIZE, 1)
    starts = torch.arange(8).view(8, 1, 1, 1) * 4
    pictures = ((columns >= starts) & (columns < starts + 4)).float().expand(8, SIZE, SIZE, 3)
    folder = Path(folder_paths.get_input_directory(), "bars")
    folder.mkdir(exist_ok=True)
    path = films.film_of(folder / "bar.mp4", pictures.contiguous())
    path.with_suffix(".txt").write_text("a red circle moves right over a blue ground")
    yield path
    for file in folder.iterdir():
        file.unlink()


def graph(clips: list, captions: str = "", **learning: Any) -> Graph:
    """Train on what `clips` links to, then sample a clip with the new MotionLoRA and save it."""
    return {
        "image": node("TinyModel"),
        "models": node("LatentMotionLoadDemoModels"),
        "module": node("LatentMotionLoadMotionModule", motion_module=f"{NAME}.safetensors"),
        "video": node("LatentMotionLoadVideo", video_file="bars/bar.mp4", frame_rate=0.0, skip_frames=0, every_nth=1,
                      frame_cap=0, width=0, height=0, fit="crop"),
        "folder": node("LatentMotionLoadVideoDataset", folder="bars", caption="", frame_rate=0.0, width=SIZE,
                       height=SIZE, fit="crop", split_shots=False, shot_threshold=0.3, frame_cap=0),
        "camera": node("LatentMotionCameraMotionClips", clips=["folder", 0], captions="", motion="zoom in", width=0,
                       source="stills", frames=FRAMES, amount=0.4, clips_each=2, height=0, seed=0),
        "train": node("LatentMotionTrainMotionLora", model=["image", 0], motion_module=["module", 0],
                      clip=["models", 1], vae=["models", 2], clips=clips, captions=captions, **LEARNING | learning),
        "prompt": node("CLIPTextEncode", clip=["models", 1], text="a red circle"),
        "latent": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=FRAMES),
        "apply": node("LatentMotionApplyMotionModule", model=["image", 0], motion_module=["train", 0], **APPLY),
        "sample": node("KSampler", model=["apply", 0], positive=["prompt", 0], negative=["prompt", 0], cfg=1.0, seed=0,
                       latent_image=["latent", 0], steps=1, sampler_name="euler", scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["models", 2]),
        "clip": node("CreateVideo", images=["decode", 0], fps=8.0),
        "save": node("LatentMotionSaveVideo", video=["clip", 0], filename_prefix="trained", format="mp4 (H.264)",
                     quality=80),
    }  # fmt: skip


def ran(result: dict) -> set[str]:
    return {data["node"] for event, data in result["messages"] if event == "executing" and data["node"]}


@pytest.mark.parametrize(("clips", "captions"), [("video", "a bar"), ("folder", ""), ("camera", "")])
def test_a_graph_learns_from_a_video_a_folder_or_a_camera(
    clips: str, captions: str, learned: Path, video: Path, run_graph: Callable
) -> None:
    result = run_graph(graph([clips, 0], captions))
    assert result["success"], result["messages"][-1]
    tensors = read_weights(learned)
    assert any(tensor.any() for key, tensor in tensors.items() if ".up." in key)
    assert result["outputs"]["save"]["images"][0]["filename"].endswith(".mp4")
    assert not Path(f"{learned}.training").exists()


def test_a_finished_training_is_not_repeated(learned: Path, video: Path, run_graph: Callable) -> None:
    run_graph(graph(["folder", 0]))
    stamp = learned.stat().st_mtime_ns
    assert "train" not in ran(run_graph(graph(["folder", 0]))), "nothing changed, so the host keeps the result"
    video.with_suffix(".txt").write_text("another caption")
    result = run_graph(graph(["folder", 0]))
    told = [data["exception_message"] for event, data in result["messages"] if event == "execution_error"]
    assert "train" in ran(result) and "made with other settings or clips" in told[0]
    assert learned.stat().st_mtime_ns == stamp


def test_cancel_in_a_graph_is_gone_on_from(
    learned: Path, video: Path, run_graph: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(step: int) -> None:
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    encoded: list[str] = []
    encode = material.encode_pictures
    monkeypatch.setattr(material, "encode_pictures", lambda *parts: encoded.append("a film") or encode(*parts))
    with monkeypatch.context() as patch:
        patch.setattr(train, "TrainingProgress", Recorder(cancel))
        result = run_graph(graph(["folder", 0]))
    assert "execution_interrupted" in [event for event, _ in result["messages"]]
    assert Path(f"{learned}.training").is_file() and not learned.exists()
    assert len(list(Path(f"{learned}.latents").iterdir())) == 1
    result = run_graph(graph(["folder", 0]))
    assert result["success"] and learned.is_file() and "image" not in ran(result)
    assert len(encoded) == 1, "the latents of a file are kept until the training is finished"
    assert not Path(f"{learned}.latents").exists()


@pytest.mark.parametrize(("change", "sentence"), [
    ({"folder": {"folder": "nowhere"}}, "There is no folder"),
    ({"train": {"file_name": "../x"}}, "is no name for a file"),
])  # fmt: skip
def test_what_a_graph_cannot_run_is_said_before_it_runs(
    change: dict, sentence: str, learned: Path, video: Path, run_graph: Callable
) -> None:
    prompt = graph(["folder", 0])
    for name, inputs in change.items():
        prompt[name]["inputs"] |= inputs
    with pytest.raises(ValueError, match=sentence):
        run_graph(prompt)


def test_a_missing_caption_is_told_on_the_node(learned: Path, video: Path, run_graph: Callable) -> None:
    video.with_suffix(".txt").unlink()
    result = run_graph(graph(["folder", 0]))
    error = next(data for event, data in result["messages"] if event == "execution_error")
    assert error["node_id"] == "folder" and "1 of the 1 videos" in error["exception_message"]
