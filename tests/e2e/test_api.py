"""Every shipped API graph through POST /prompt on the demo models, its files found through /history and fetched."""

from __future__ import annotations

import io
import json
import urllib.parse
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from demo_clips import provide_clip_with_tone
from host_server import HostServer, ask
from PIL import Image

API_WORKFLOWS = sorted((Path(__file__).resolve().parent.parent.parent / "workflows" / "api").glob("*.json"))
OF_A_VIDEO = ("continue_a_video", "tune_a_video", "video_to_video")


def fetch(server: HostServer, file: dict[str, Any]) -> bytes:
    """One output file through /view, as the canvas fetches it."""
    query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
    with ask(f"{server.url}/view?{query}") as answer:
        return answer.read()


def frames_of(data: bytes, name: str) -> list[Image.Image]:
    """Every picture of an image or video file."""
    if name.endswith((".png", ".jpg", ".webp")):
        return [Image.open(io.BytesIO(data)).convert("RGB")]
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def is_flat(picture: Image.Image) -> bool:
    """Whether a picture has (nearly) one colour only: what an unfinished or failed run saves."""
    return all(high - low < 8 for low, high in picture.getextrema())


def files_in(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that a /history entry names."""
    values = [value for node in entry["outputs"].values() for value in node.values()]
    return [item for value in values for item in value if isinstance(item, dict) and "filename" in item]


def test_there_are_graphs() -> None:
    assert "text_to_video" in [path.stem for path in API_WORKFLOWS]


@pytest.mark.parametrize("path", API_WORKFLOWS, ids=lambda path: path.stem)
def test_graph_makes_its_files(server: HostServer, path: Path) -> None:
    prompt = json.loads(path.read_text(encoding="utf-8"))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"]["messages"][-1], indent=1)
    files = files_in(entry)
    assert files, f"{path.name} saved nothing"
    for file in files:
        frames = frames_of(fetch(server, file), file["filename"])
        assert frames and not all(is_flat(frame) for frame in frames), f"{file['filename']} shows nothing"


def test_the_clip_moves(server: HostServer) -> None:
    (path,) = (path for path in API_WORKFLOWS if path.stem == "text_to_video")
    prompt = json.loads(path.read_text(encoding="utf-8"))
    wanted = next(node["inputs"]["batch_size"] for node in prompt.values() if node["class_type"] == "EmptyLatentImage")
    (file,) = files_in(server.run(prompt))
    frames = frames_of(fetch(server, file), file["filename"])
    assert len(frames) == wanted
    assert frames[0].tobytes() != frames[-1].tobytes()


def sound_of(data: bytes) -> tuple[np.ndarray, int]:
    """First channel of a video file's sound, (samples,), and samples a second."""
    with av.open(io.BytesIO(data)) as container:
        heard = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        return np.concatenate(heard), container.streams.audio[0].rate


@pytest.mark.parametrize("name", OF_A_VIDEO)
def test_the_sound_of_the_source_is_in_the_file(server: HostServer, name: str) -> None:
    """With few steps, but up to the noise: the pictures do not matter. Every workflow that loads a video is asked."""
    prompts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in API_WORKFLOWS}
    loaders = {stem: [node for node in prompt.values() if "video_file" in node["inputs"]]
               for stem, prompt in prompts.items()}  # fmt: skip
    assert tuple(stem for stem, found in loaders.items() if found) == OF_A_VIDEO
    provide_clip_with_tone(server.base, "tone.mp4")
    (loader,) = loaders[name]
    loader["inputs"]["video_file"] = "tone.mp4"
    for node in prompts[name].values():
        quick = {"reconstruct": False} if "convention" in node["inputs"] else {"steps": 2, "file_name": "tone"}
        node["inputs"] |= {key: value for key, value in quick.items() if key in node["inputs"]}
    entry = server.run(prompts[name])
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"]["messages"][-1], indent=1)
    (file,) = (file for file in files_in(entry) if file["filename"].endswith(".mp4"))
    samples, rate = sound_of(fetch(server, file))
    assert len(samples) / rate == pytest.approx(2.0, abs=0.2), "16 frames at 8 a second, as the clip that was loaded"
    heard = np.abs(np.fft.rfft(samples[: 2 * rate]))
    assert heard.argmax() * rate / len(samples[: 2 * rate]) == pytest.approx(440, abs=2)
