"""Every canvas workflow in the real front end: it opens whole, says what the file says, and the demo one runs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pack
import pytest
import torch
from host_server import PACK_NAME, HostServer, ask

playwright = pytest.importorskip("playwright", reason="playwright is not installed (requirements-dev.txt)")
from front_end import FrontEnd  # noqa: E402

pack.load_pack()
from latentmotion.demo import oracle  # noqa: E402
from latentmotion.demo.captions import sentences  # noqa: E402
from latentmotion.media import write  # noqa: E402
from latentmotion.media.clip import clip_of_images  # noqa: E402
from latentmotion.media.formats import Format  # noqa: E402

FORGET = """() => fetch("/free", {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({free_memory: true}),
}).then((answer) => answer.ok)"""

ROOT = Path(__file__).resolve().parent.parent.parent
NO_VALUES = ("upload", "video-preview")  # a button and a picture on nodes that load a video
CANVAS = sorted((ROOT / "workflows").glob("*.json"))
DEMO = ROOT / "workflows" / "text_to_video.json"
# What a person sees of each node: whether it is known and red, and its widgets as they stand.
NODES = """() => app.graph.nodes.map((node) => ({
    id: String(node.id), type: node.type, title: node.title, red: Boolean(node.has_errors),
    known: Boolean(LiteGraph.registered_node_types[node.type]),
    widgets: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value])),
    choices: Object.fromEntries((node.widgets ?? []).filter((widget) => Array.isArray(widget.options?.values))
        .map((widget) => [widget.name, widget.options.values])),
    unlinked: (node.inputs ?? []).filter((input) => input.link == null && !input.widget && input.shape !== 7)
        .map((input) => input.name),
}))"""
SHOWN = """(id) => {
    const node = app.graph.getNodeById(id);
    const element = (node.widgets ?? []).map((widget) => widget.element?.querySelector?.("video")
        ?? (widget.element?.tagName === "VIDEO" ? widget.element : null)).find(Boolean);
    const video = element ?? node.videoContainer?.querySelector("video");
    return video ? {source: video.currentSrc || video.src, width: video.videoWidth, seconds: video.duration} : null;
}"""


@pytest.fixture(scope="module")
def front_end(chromium: str, server: HostServer) -> Iterator[FrontEnd]:
    """One browser for all tests; opening it takes a while."""
    with FrontEnd(server, chromium) as opened:
        yield opened


@pytest.fixture(autouse=True)
def console_is_quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail any test with a browser during which the page complained."""
    opened = request.getfixturevalue("front_end") if "front_end" in request.fixturenames else None
    if opened:
        opened.complaints.clear()
    yield
    assert not (opened and opened.complaints), "\n".join(opened.complaints)


def api_of(path: Path) -> dict[str, Any]:
    """The API graph that belongs to a canvas workflow."""
    return json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))


def links_of(graph: dict[str, Any]) -> list[list[str]]:
    """Every link without its number: source, slot, target, slot, type."""
    return sorted([str(part) for part in link[1:]] for link in graph["links"])


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Where a graph of the front end says something else than the API graph.

    A newer host may have appended widgets to its own nodes, or moved one behind another (codec to format.codec).
    """
    told = [f"nodes {found.keys() ^ wanted.keys()}"] if found.keys() != wanted.keys() else []
    for key, node in wanted.items():
        kind, inputs = node["class_type"], found.get(key, {}).get("inputs", {})
        inputs = {name: value for name, value in inputs.items() if name not in NO_VALUES}
        if found.get(key, {}).get("class_type") != kind:
            told.append(f"node {key} is not a {kind}")
        if kind.startswith("LatentMotion") and inputs != node["inputs"]:
            told.append(f"node {key} ({kind}): {inputs} instead of {node['inputs']}")
        for name, value in node["inputs"].items():
            values = [other for place, other in inputs.items() if place.split(".")[-1] == name]
            if value not in values:
                told.append(f"node {key} ({kind}): {name} is {values} instead of {value!r}")
    return told


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_workflow_opens_whole(front_end: FrontEnd, test_results: Path, path: Path) -> None:
    canvas = front_end.open(path)
    front_end.screenshot(test_results / f"canvas-{path.stem}.png")
    nodes = front_end.evaluate(NODES)
    assert {node["id"] for node in nodes} == {str(node["id"]) for node in canvas["nodes"]}
    for node in nodes:
        name = f"node {node['id']} ({node['type']})"
        assert node["known"] and not node["red"], f"{name} is missing or red"
        assert not node["unlinked"], f"{name} has nothing connected to {node['unlinked']}"
        for widget, choices in node["choices"].items():
            value = node["widgets"][widget]
            assert value in choices, f"{name}: {widget} is {value}, not one of {choices}"
    assert front_end.evaluate("() => app.graph.groups.length") == len(canvas["groups"])
    assert not differences(front_end.prompt(), api_of(path))


@pytest.mark.parametrize("path", CANVAS, ids=lambda path: path.stem)
def test_workflow_survives_saving(front_end: FrontEnd, path: Path) -> None:
    """What the front end writes is what it read: no widget moved, no link lost, nothing resized to fit.

    A newer host may have appended widgets and outputs to its own nodes.
    """
    canvas = front_end.open(path)
    saved = front_end.evaluate("() => app.graph.serialize()")
    by_id = {str(node["id"]): node for node in saved["nodes"]}
    for node in canvas["nodes"]:
        after, values = by_id[str(node["id"])], node.get("widgets_values", [])
        assert after.get("widgets_values", [])[: len(values)] == values
        assert list(after["pos"]) == node["pos"], node["type"]
        more = len(after.get("widgets_values", [])) > len(values) or len(after["outputs"]) > len(node["outputs"])
        grown = more and not node["type"].startswith("LatentMotion")
        assert grown or list(after["size"]) == node["size"], node["type"]
    assert links_of(saved) == links_of(canvas)


def test_templates_are_offered(server: HostServer) -> None:
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == [path.stem for path in CANVAS]
    for path in CANVAS:
        with ask(f"{server.url}/api/workflow_templates/{PACK_NAME}/{path.stem}.jpg") as answer:
            assert answer.read() == path.with_suffix(".jpg").read_bytes()


def video_file(server: HostServer, item: dict[str, str]) -> Path:
    """Where the server put an output."""
    return server.base / item["type"] / item["subfolder"] / item["filename"]


@pytest.fixture(scope="module")
def made(front_end: FrontEnd) -> dict[str, Any]:
    """The demo workflow, run from the canvas as a person does; what the front end was told of its outputs."""
    # A clip of the same graph that an API test left in the host's cache would carry no canvas workflow.
    front_end.evaluate(FORGET)
    front_end.open(DEMO)
    ended = front_end.run()
    assert ended["type"] == "execution_success", ended
    return front_end.evaluate("() => app.nodeOutputs")


def test_demo_runs_from_the_canvas(
    front_end: FrontEnd, server: HostServer, made: dict[str, Any], test_results: Path
) -> None:
    (saver,) = (node for node in json.loads(DEMO.read_text())["nodes"] if node["type"] == "SaveVideo")
    (item,) = made[str(saver["id"])]["images"]
    with av.open(str(video_file(server, item))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16
    text = DEMO.read_text()
    (words,) = (words for split in ("train", "test") for words in sentences(split, True) if words.text in text)
    readings = oracle.read(torch.from_numpy(np.stack(frames)) / 255)
    assert all(reading.shows(words) for reading in readings), readings
    assert oracle.path(readings)[0] == words.direction
    front_end.page.wait_for_function(f"() => ({SHOWN})({saver['id']})?.width > 0", timeout=60_000)
    shown = front_end.evaluate(SHOWN, saver["id"])
    assert item["filename"] in shown["source"]
    assert shown["width"] == frames[0].shape[1] and shown["seconds"] == pytest.approx(2.0, abs=0.1)
    front_end.screenshot(test_results / "canvas-text_to_video-done.png")


def test_dropping_the_video_restores_the_graph(
    front_end: FrontEnd, server: HostServer, made: dict[str, Any]
) -> None:
    (item,) = (file for output in made.values() for file in output.get("images", []))
    data = video_file(server, item).read_bytes()
    front_end.evaluate("() => app.graph.clear()")
    front_end.drop(data, item["filename"], "video/mp4")
    assert not differences(front_end.prompt(), api_of(DEMO))
    assert len(front_end.evaluate(NODES)) == len(json.loads(DEMO.read_text())["nodes"])
    with av.open(io.BytesIO(data)) as container:
        assert "workflow" in container.metadata


@pytest.mark.parametrize(("form", "kind"), [
    (Format.MP4, "video/mp4"), (Format.WEBM_VP9, "video/webm"), (Format.WEBM_AV1, "video/webm"),
    (Format.WEBP, "image/webp"), (Format.PNG, "image/png"),
])  # fmt: skip
def test_dropping_any_format_we_save_restores_the_graph(
    front_end: FrontEnd, form: Format, kind: str, tmp_path: Path
) -> None:
    """Also where a prompt has braces that do not match, over which the canvas's reader of webm stumbles."""
    workflow, prompt = json.loads(DEMO.read_text()), api_of(DEMO)
    workflow["extra"] = {"said": 'an odd {"brace" and {{ more'}
    clip = clip_of_images(torch.rand(3, 33, 32, 3), Fraction(8))
    path = tmp_path / f"film{form.extension}"
    write.write(clip, path, form, write.Writing(80, {"workflow": workflow, "prompt": prompt}))
    file = sorted(path.iterdir())[-1] if path.is_dir() else path
    front_end.evaluate("() => app.graph.clear()")
    front_end.drop(file.read_bytes(), file.name, kind)
    assert not differences(front_end.prompt(), prompt)
    assert front_end.evaluate("() => app.graph.serialize().extra.said") == workflow["extra"]["said"]


def test_help_of_every_node_is_shown(front_end: FrontEnd, server: HostServer, test_results: Path) -> None:
    """The pages are served, and the front end finds them for a selected node."""
    front_end.open(DEMO)
    own = sorted(name for name in server.get("/object_info") if name.startswith("LatentMotion"))
    for name in own:
        with ask(f"{server.url}/extensions/{PACK_NAME}/docs/{name}.md") as answer:
            heading = answer.read().decode().splitlines()[0].removeprefix("# ")
        assert heading == server.get(f"/object_info/{name}")[name]["display_name"]
    front_end.evaluate("""() => app.canvas.selectNode(
        app.graph.nodes.find((node) => node.type === "LatentMotionApplyMotionModule"))""")
    front_end.page.get_by_test_id("info-button").click()
    front_end.page.get_by_text("Values per frame").wait_for(timeout=30_000)
    front_end.screenshot(test_results / "canvas-help.png")


def test_what_a_run_found_out_is_shown_and_not_saved(front_end: FrontEnd, test_results: Path) -> None:
    front_end.open(ROOT / "workflows" / "edit_a_video.json")
    shown = front_end.evaluate("""() => {
        const node = app.graph.nodes.find(({type}) => type === "LatentMotionDDIMInversion");
        const saved = JSON.stringify(node.serialize().widgets_values);
        node.onExecuted({text: ["differs by 3 %"]});
        return [node.widgets.at(-1).element.textContent, JSON.stringify(node.serialize().widgets_values) === saved];
    }""")
    assert shown == ["differs by 3 %", True]
    front_end.screenshot(test_results / "canvas-result-text.png")
