"""What a person sees while a long clip is sampled and saved: its windows, the clip moving, how far it is; at the end
the video, and a graph that is what it was."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_server import HostServer
from PIL import Image, ImageChops, ImageStat

playwright = pytest.importorskip("playwright", reason="playwright is not installed (requirements-dev.txt)")
from front_end import FrontEnd  # noqa: E402

LONG = Path(__file__).resolve().parent.parent.parent / "workflows" / "stream_to_file.json"
FRAMES, STEPS = 28, 6  # two windows of 16
LONG_SIDE = 384
# Runs the open graph, shortened, and keeps what the page is told to show.
START = """async ([frames, steps]) => {
    const of = (type) => app.graph.nodes.find((node) => node.type === type);
    const set = (node, name, value) => { node.widgets.find((widget) => widget.name === name).value = value; };
    set(of("EmptyLatentImage"), "batch_size", frames);
    set(of("KSampler"), "steps", steps);
    window.seen = {shown: 0, previews: [], sheets: [], texts: [], ended: null};
    app.api.addEventListener("latentmotion.preview", ({detail}) => seen.sheets.push(detail));
    app.api.addEventListener("b_preview_with_metadata", async ({detail}) => {
        seen.shown += 1;
        const bytes = new Uint8Array(await detail.blob.arrayBuffer());
        const data = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
        seen.previews.push({node: detail.displayNodeId, own: Boolean(detail.latentmotion), data});
    });
    app.api.addEventListener("progress_text", ({detail}) => seen.texts.push([String(detail.nodeId), detail.text]));
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, () => { seen.ended = kind; }, {once: true});
    const shown = ["KSampler", "LatentMotionTemporalVAEDecode"];
    const ids = Object.fromEntries(shown.map((type) => [type, String(of(type).id)]));
    const before = JSON.stringify(app.graph.serialize().nodes.map((node) => node.widgets_values));
    await app.queuePrompt(0, 1);
    return {ids, before};
}"""
# Shows a sheet of the run once more, as long as it takes to look at it; then says that the node is done.
PLAY = """() => {
    seen.previews.length = 0;
    app.api.dispatchEvent(new CustomEvent("latentmotion.preview", {detail: seen.sheets[0]}));
}"""
STOP = """() => {
    const {node_id, display_node_id, prompt_id} = seen.sheets[0];
    const node = {node_id, display_node_id, prompt_id, state: "finished", value: 1, max: 1};
    app.api.dispatchEvent(new CustomEvent("progress_state", {detail: {prompt_id, nodes: {[node_id]: node}}}));
    return seen.shown;
}"""
VALUES = "() => JSON.stringify(app.graph.serialize().nodes.map((node) => node.widgets_values))"
PLAYED = """() => [...document.querySelectorAll("video")].filter((video) => video.videoWidth > 0)
    .map((video) => video.currentSrc || video.src)"""


@pytest.fixture(scope="module")
def front_end(chromium: str, server: HostServer) -> Iterator[FrontEnd]:
    with FrontEnd(server, chromium) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(front_end: FrontEnd, test_results: Path) -> dict[str, Any]:
    """One run of the workflow: what was shown meanwhile and is played again, with a screenshot of it and of the end."""
    front_end.open(LONG)
    started = front_end.evaluate(START, [FRAMES, STEPS])
    front_end.page.wait_for_function("() => seen.ended", timeout=600_000)
    front_end.page.wait_for_function(f"() => ({PLAYED})().length", timeout=60_000)
    front_end.screenshot(test_results / "canvas-preview-done.png")
    found = front_end.evaluate("() => seen")
    front_end.evaluate(PLAY)
    front_end.page.wait_for_function("() => seen.previews.length > 8", timeout=120_000)
    front_end.screenshot(test_results / "canvas-preview.png")
    stopped = front_end.evaluate(STOP)
    front_end.page.wait_for_timeout(1000)
    played, shown = front_end.evaluate("() => [seen.previews, seen.shown]")
    return {
        **started,
        **found,
        "played": played,
        "after_the_end": shown - stopped,
        "complaints": list(front_end.complaints),
    }


def picture(preview: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(preview["data"]))).convert("RGB")


def test_the_clip_moves_on_the_node_that_samples(run: dict[str, Any]) -> None:
    assert run["ended"] == "execution_success" and not run["complaints"], run["complaints"]
    assert any(not preview["own"] for preview in run["previews"]), "the host's own preview goes on beside it"
    assert {(sheet["display_node_id"], sheet["count"]) for sheet in run["sheets"]} == {(run["ids"]["KSampler"], 16)}
    assert {(shown["own"], shown["node"]) for shown in run["played"]} == {(True, run["ids"]["KSampler"])}
    pictures = [picture(preview) for preview in run["played"]]
    assert {max(shown.size) for shown in pictures} == {LONG_SIDE}
    steps = [ImageStat.Stat(ImageChops.difference(a, b)).mean for a, b in zip(pictures, pictures[1:], strict=False)]
    assert sum(max(step) > 1 for step in steps) >= 4, "neighbouring pictures are other frames"


def test_it_stops_when_the_node_is_done(run: dict[str, Any]) -> None:
    assert run["after_the_end"] == 0


def test_windows_steps_and_memory_are_named(run: dict[str, Any]) -> None:
    told = {node: [text for at, text in run["texts"] if at == node] for node in run["ids"].values()}
    sampling, decoding = told[run["ids"]["KSampler"]], told[run["ids"]["LatentMotionTemporalVAEDecode"]]
    line = r"window [123]/3, step \d/6, about \d+ MiB"
    assert re.fullmatch(r"16 frames at once, about \d+ MiB of \d+ MiB free", sampling[0])
    assert sampling[1:] and all(re.fullmatch(line, text) for text in sampling[1:])
    assert re.fullmatch(r"decoding 4 frames at once, about \d+ MiB of \d+ MiB free", decoding[0])


def test_the_video_is_shown_and_the_graph_is_what_it_was(run: dict[str, Any], front_end: FrontEnd) -> None:
    assert any("stream_to_file" in source for source in front_end.evaluate(PLAYED))
    assert front_end.evaluate(VALUES) == run["before"], "no progress text among the values of a saved workflow"


def test_windows_are_drawn_on_the_node(run: dict[str, Any], front_end: FrontEnd) -> None:
    front_end.page.wait_for_function("() => document.querySelector('.latentmotion-windows svg')", timeout=30_000)
    drawn = front_end.evaluate("() => document.querySelector('.latentmotion-windows').textContent")
    assert drawn.startswith(f"{FRAMES} frames"), "also where another node sets the length"
    cells = front_end.evaluate("() => document.querySelectorAll('.latentmotion-windows svg rect').length")
    assert re.fullmatch(r"\d+ frames, \d+ windows", drawn) and cells == 16 * int(drawn.split()[2]), drawn
