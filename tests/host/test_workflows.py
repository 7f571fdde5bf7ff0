"""Every shipped workflow, for the canvas and in API format, against the nodes that are registered."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import execution
import nodes
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = ROOT / "workflows"
API = sorted((WORKFLOWS / "api").glob("*.json"))
CANVAS = sorted(WORKFLOWS.glob("*.json"))
NOTES = {"Note", "MarkdownNote"}  # known to the front end only
THUMBNAIL_BYTES = 40_000
# Inputs that name a model file, and the folder it lies in.
FOLDERS = {
    "motion_module": "animatediff_models",
    "motion_lora": "animatediff_motion_lora",
    "lora_name": "loras",
    "control_net_name": "controlnet",
}
AFTER_A_RUN = ("fixed", "increment", "decrement", "randomize")
Prompt = dict[str, dict[str, Any]]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def model_files(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """(folder, file name) of every model file that a graph names."""
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if name in FOLDERS and isinstance(value, str):
                yield FOLDERS[name], value


def widgets_of(node: dict[str, Any]) -> dict[str, Any]:
    """Widget values of a canvas node by name. What happens to a seed after a run is one more, where a node lets it."""
    values = list(node.get("widgets_values", []))
    found = {}
    for item in node.get("inputs", []):
        if "widget" in item:
            if item["widget"]["name"] == "upload":  # a button
                values.pop(0)
                continue
            found[item["widget"]["name"]] = values.pop(0)
            if item["name"] in ("seed", "noise_seed") and values and values[0] in AFTER_A_RUN:
                assert values.pop(0) == "fixed", f"node {node['id']}: a shipped workflow must give the same clip again"
    assert not values, f"node {node['id']} ({node['type']}) has more values than widgets"
    return found


def as_prompt(canvas: dict[str, Any]) -> Prompt:
    """The API graph that a canvas workflow stands for; titles only where they are not the node's own."""
    links = {link[0]: link for link in canvas["links"]}
    prompt = {}
    for node in canvas["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = widgets_of(node)
        for item in node.get("inputs", []):
            if item.get("link") is not None:
                _, source, slot, *_ = links[item["link"]]
                inputs[item["name"]] = [str(source), slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        if "title" in node:
            prompt[str(node["id"])]["_meta"] = {"title": node["title"]}
    return prompt


def wrong_choices(prompt: Prompt) -> Iterator[str]:
    """Values that a V3 combo does not offer, which ComfyUI 0.3.75 does not look at."""
    for node_id, node in prompt.items():
        known = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        for name, value in node["inputs"].items():
            kind, *about = {**known.get("required", {}), **known.get("optional", {})}[name]
            if kind == "COMBO" and value not in about[0]["options"]:
                yield f"node {node_id}: {name} is {value!r}, not one of {about[0]['options']}"


def problems(prompt: Prompt) -> str:
    """What the host's own validation says against a graph, "" where it accepts it."""
    with torch.inference_mode(False):
        valid, error, _, node_errors = asyncio.run(execution.validate_prompt("test", deepcopy(prompt), None))
    if not valid or node_errors:
        return f"{error} {json.dumps(node_errors, indent=1)}"
    return "\n".join(wrong_choices(prompt))


@pytest.fixture
def with_files(base_directory: Path, pack_nodes: dict[str, type]) -> Iterator[Callable[[Prompt], None]]:
    """Make every model file that a graph names selectable, as an empty file where it is not there."""
    import folder_paths

    made: list[Path] = []

    def provide(prompt: Prompt) -> None:
        for folder, name in model_files(prompt):
            if name not in folder_paths.get_filename_list(folder):
                path = base_directory / "models" / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                made.append(path)
        folder_paths.filename_list_cache.clear()

    yield provide
    for path in made:
        path.unlink()
    folder_paths.filename_list_cache.clear()


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_host_accepts_the_graph(path: Path, with_files: Callable[[Prompt], None]) -> None:
    prompt = read(path)
    with_files(prompt)
    assert not problems(prompt), problems(prompt)


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_graph_names_known_inputs_only(path: Path, core_nodes: dict[str, type], pack_nodes: dict[str, type]) -> None:
    for node_id, node in read(path).items():
        known = core_nodes[node["class_type"]].INPUT_TYPES()
        names = {**known.get("required", {}), **known.get("optional", {})}
        unknown = [name for name in node["inputs"] if name not in names]
        assert not unknown, f"node {node_id} ({node['class_type']}) has no input {unknown}"


@pytest.mark.parametrize(("node_id", "name", "value"), [
    ("3", "strength", 99.0), ("3", "positions", "somehow"), ("3", "model", ["2", 0]), ("2", "motion_module", "none"),
])  # fmt: skip
def test_a_wrong_value_is_noticed(
    node_id: str, name: str, value: Any, with_files: Callable[[Prompt], None]
) -> None:
    prompt = read(WORKFLOWS / "api" / "text_to_video.json")
    with_files(prompt)
    prompt[node_id]["inputs"][name] = value
    assert name in problems(prompt)


def test_canvas_and_api_come_in_pairs() -> None:
    assert [path.stem for path in CANVAS] == [path.stem for path in API]


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_canvas_says_what_the_api_graph_says(path: Path) -> None:
    wanted = read(WORKFLOWS / "api" / path.name)
    found = as_prompt(read(path))
    assert found.keys() == wanted.keys()
    for node_id, node in wanted.items():
        assert found[node_id] == {key: node[key] for key in found[node_id]}, f"node {node_id}"


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_canvas_is_laid_out(path: Path) -> None:
    canvas = read(path)
    title_height = 30
    boxes = {node["id"]: (node["pos"][0], node["pos"][1] - title_height, node["pos"][0] + node["size"][0],
                          node["pos"][1] + node["size"][1]) for node in canvas["nodes"]}  # fmt: skip
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"nodes {one} and {other} overlap"
    for _, source, _, target, *_ in canvas["links"]:
        forward = boxes[source][0] < boxes[target][0] or boxes[source][3] <= boxes[target][1]
        assert forward, f"the link from {source} to {target} runs neither to the right nor down"


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_canvas_explains_itself(path: Path) -> None:
    notes = [node for node in read(path)["nodes"] if node["type"] in NOTES]
    assert notes and len(notes[0]["widgets_values"][0]) > 80
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.format == "JPEG" and min(thumbnail.size) >= 200
    assert path.with_suffix(".jpg").stat().st_size <= THUMBNAIL_BYTES


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_model_files_come_with_the_pack(path: Path) -> None:
    """A file that does not must be named in the note, so that a person knows what to look for."""
    canvas = read(path)
    notes = " ".join(node["widgets_values"][0] for node in canvas["nodes"] if node["type"] in NOTES)
    for folder, name in model_files(as_prompt(canvas)):
        shipped = (ROOT / "demo" / "weights" / folder / name).is_file()
        assert shipped or re.search(rf"models/{folder}/{re.escape(name)}", notes), f"{name} is neither there nor named"
