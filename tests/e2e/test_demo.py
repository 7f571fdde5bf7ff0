"""`run.py demo` against a running server: what its client prints, writes and says when a graph does not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_clip
import numpy as np
import pack
import pytest
import torch
from host_server import HostServer
from PIL import Image

pack.load_pack()
from latentmotion.demo import oracle  # noqa: E402
from latentmotion.demo.captions import Words  # noqa: E402

GRAPH = Path(__file__).resolve().parent.parent.parent / "workflows" / "api" / "text_to_video.json"
CAPTION = Words("red", "circle", "blue", "right")


def make(server: HostServer, graph: Path, folder: Path) -> int:
    return make_clip.main(["--url", server.url, "--workflow", str(graph), "--folder", str(folder / "clips"),
                           "--json", str(folder / "facts.json")])  # fmt: skip


def changed(folder: Path, node: str, **inputs: Any) -> Path:
    """The demo's graph with other inputs on one of its nodes."""
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    graph[node]["inputs"] |= inputs
    path = folder / "changed.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def cells(sheet: Path, count: int, width: int, height: int) -> torch.Tensor:
    """The frames of a contact sheet that shows them in their own size: (count, height, width, 3) in [0, 1]."""
    picture, gap = np.asarray(Image.open(sheet).convert("RGB")), make_clip.SHEET_GAP
    places = [divmod(number, make_clip.SHEET_COLUMNS) for number in range(count)]
    corners = [(row * (height + gap), column * (width + gap)) for row, column in places]
    return torch.from_numpy(np.stack([picture[y : y + height, x : x + width] for y, x in corners])) / 255


def test_the_demo_shows_what_its_caption_says(
    server: HostServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert CAPTION.text in GRAPH.read_text(encoding="utf-8")
    assert make(server, GRAPH, tmp_path) == 0
    said, facts = capsys.readouterr().out, json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert (facts["frames"], facts["width"], facts["height"], facts["fps"]) == (16, 128, 128, 8.0)
    video, sheet = Path(facts["video"]), Path(facts["contact_sheet"])
    assert str(video) in said and str(sheet) in said
    assert video.suffix == ".mp4" and video.stat().st_size > 1000
    readings = oracle.read(cells(sheet, 16, 128, 128))
    wrong = [reading for reading in readings if not reading.shows(CAPTION)]
    assert not wrong, wrong
    way, straightness = oracle.path(readings)
    assert way == CAPTION.direction and straightness > 0.95


def test_clips_are_numbered(server: HostServer, tmp_path: Path) -> None:
    for _ in range(2):
        assert make(server, GRAPH, tmp_path) == 0
    names = sorted(path.name for path in (tmp_path / "clips").iterdir())
    assert names == [f"text_to_video_000{number}{ending}" for number in (1, 2) for ending in (".mp4", ".png")]


def test_two_demos_at_once_take_two_names(tmp_path: Path) -> None:
    names = [make_clip.free_name(tmp_path / "clips", "clip", ".mp4").name for _ in range(2)]  # neither has written yet
    assert names == ["clip_0001.mp4", "clip_0002.mp4"]


@pytest.mark.parametrize(("node", "inputs", "sentences"), [
    ("7", {"sampler_name": "no such sampler"}, ("node 7 (KSampler)", "no such sampler")),
    ("6", {"batch_size": 40}, ("KSampler:", "32")),
], ids=["refused", "failing"])  # fmt: skip
def test_a_graph_that_does_not_work_is_explained(
    node: str, inputs: dict[str, Any], sentences: tuple[str, ...], server: HostServer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert make(server, changed(tmp_path, node, **inputs), tmp_path) == 1
    said = capsys.readouterr().out
    assert all(sentence in said for sentence in ("The graph changed.json failed:", *sentences)), said
    assert not (tmp_path / "clips").exists() and not (tmp_path / "facts.json").exists()
