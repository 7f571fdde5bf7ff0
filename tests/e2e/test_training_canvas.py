"""What a person sees of a training run: the losses on the node while it works and afterwards, in words too; at the end
the video."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from host_server import HostServer
from PIL import Image

playwright = pytest.importorskip("playwright", reason="playwright is not installed (requirements-dev.txt)")
from front_end import FrontEnd  # noqa: E402

WORKFLOWS = Path(__file__).resolve().parent.parent.parent / "workflows"
# By workflow: the node that trains, and fewer steps than the workflow has.
TRAINING = {
    "train_motion_lora": ("LatentMotionTrainMotionLora", {"LatentMotionTrainMotionLora": 6, "KSampler": 2}),
    "train_motion_module": (
        "LatentMotionTrainMotionModule",
        {"LatentMotionTrainMotionModule": 4, "LatentMotionTrainDomainAdapter": 2, "KSampler": 2},
    ),
    "tune_a_video": ("LatentMotionTuneVideoModel", {"LatentMotionTuneVideoModel": 8, "LatentMotionDDIMInversion": 4}),
}
STEPS = {name: steps[trainer] for name, (trainer, steps) in TRAINING.items()}
GROUND, MEAN = (30, 30, 34), (240, 180, 76)  # of the plot
# Runs the open graph with other steps, into a file that no other test writes, and keeps the pictures that come.
START = """async (steps) => {
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? []) {
            if (widget.name === "steps" && node.type in steps) widget.value = steps[node.type];
            if (widget.name === "file_name") widget.value = `canvas_${widget.value}`;
        }
    window.seen = {previews: [], ended: null};
    app.api.addEventListener("b_preview_with_metadata", async ({detail}) => {
        const bytes = new Uint8Array(await detail.blob.arrayBuffer());
        const data = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
        seen.previews.push({node: detail.displayNodeId, data});
    });
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, () => { seen.ended = kind; }, {once: true});
    await app.queuePrompt(0, 1);
}"""
SHOW = """(type) => {
    const node = app.graph.nodes.find((node) => node.type === type);
    app.canvas.ds.scale = 1;
    app.canvas.centerOnNode(node);
    app.canvas.setDirty(true, true);
}"""
# Where a node's picture and text are on the page, and what they are.
NODE = """(type) => {
    const node = app.graph.nodes.find((node) => node.type === type);
    const picture = node.widgets.find(({name}) => name === "$$canvas-image-preview");
    const text = node.widgets.find(({name}) => name === "result")?.element;
    const {scale, offset} = app.canvas.ds, around = app.canvas.canvas.getBoundingClientRect();
    const at = (axis, value) => (node.pos[axis] + value + offset[axis]) * scale + (axis ? around.top : around.left);
    const box = picture && {x: at(0, 0), y: at(1, picture.y), width: node.size[0] * scale,
                            height: picture.computedHeight * scale};
    const lines = text?.getBoundingClientRect();
    const frame = app.graph.groups.find(({pos, size}) =>
        [0, 1].every((axis) => pos[axis] <= node.pos[axis] && node.pos[axis] < pos[axis] + size[axis]));
    return {
        id: String(node.id), size: [...node.size], natural: node.imgs?.map((image) => image.naturalWidth) ?? [], box,
        text: text?.textContent, hidden: text && text.scrollHeight > text.clientHeight + 1,
        told: node.widgets.some(({name}) => name === "$$node-text-preview"),
        textBox: lines && [lines.left, lines.top, lines.width, lines.height], shownTo: at(1, node.size[1]),
        frameTo: at(1, frame.pos[1] + frame.size[1] - node.pos[1]),
    };
}"""
PLAYED = """() => [...document.querySelectorAll("video")].filter((video) => video.videoWidth > 0)
    .map((video) => video.currentSrc || video.src)"""
ANY = 80  # pixels of one colour that make it seen


@pytest.fixture(scope="module")
def front_end(chromium: str, server: HostServer) -> Iterator[FrontEnd]:
    with FrontEnd(server, chromium) as opened:
        yield opened


def finish(front_end: FrontEnd, name: str) -> str:
    """Open a workflow and run it with fewer steps: how it ended."""
    front_end.open(WORKFLOWS / f"{name}.json")
    front_end.evaluate(START, TRAINING[name][1])
    front_end.page.wait_for_function("() => seen.ended", timeout=600_000)
    return front_end.evaluate("() => seen.ended")


def look(front_end: FrontEnd, name: str, path: Path) -> dict[str, Any]:
    """The training node as it is on the page, with `seen`: the part of the page where its picture is."""
    trainer = TRAINING[name][0]
    front_end.page.wait_for_function(f"() => ({NODE})('{trainer}').natural.length", timeout=60_000)
    front_end.evaluate(SHOW, trainer)
    front_end.page.wait_for_timeout(1000)
    front_end.screenshot(path)
    found = front_end.evaluate(NODE, trainer)
    found["seen"] = Image.open(io.BytesIO(front_end.page.screenshot(clip=found["box"]))).convert("RGB")
    return found


def pixels_like(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels have nearly this colour."""
    near = [all(abs(a - b) < 40 for a, b in zip(pixel, colour, strict=True)) for pixel in picture.getdata()]
    return sum(near)


@pytest.fixture(scope="module", params=sorted(TRAINING))
def run(request: pytest.FixtureRequest, front_end: FrontEnd, server: HostServer, test_results: Path) -> dict[str, Any]:
    """One run of a workflow, and the page after it; then the same again, which the host has in its cache."""
    name = request.param
    ended = finish(front_end, name)
    front_end.page.wait_for_function(f"() => ({PLAYED})().some((source) => source.includes('{name}'))", timeout=60_000)
    front_end.screenshot(test_results / f"canvas-{name}-done.png")
    previews, outputs = front_end.evaluate("() => [seen.previews, app.nodeOutputs]")
    first = look(front_end, name, test_results / f"canvas-{name}-losses.png")
    again = finish(front_end, name)
    return {
        "name": name, "ended": [ended, again], "previews": previews, "outputs": outputs, "first": first,
        "again": look(front_end, name, test_results / f"canvas-{name}-losses-again.png"),
        "previews_again": len(front_end.evaluate("() => seen.previews")), "complaints": list(front_end.complaints),
    }  # fmt: skip


def test_losses_are_drawn_meanwhile(run: dict[str, Any]) -> None:
    assert run["ended"][0] == "execution_success" and not run["complaints"], run["complaints"]
    drawn = [shown["data"] for shown in run["previews"] if shown["node"] == run["first"]["id"]]
    assert drawn, "no picture came while the node trained"
    picture = Image.open(io.BytesIO(base64.b64decode(drawn[-1]))).convert("RGB")
    assert picture.size == (480, 240)
    assert pixels_like(picture, MEAN) > ANY, "the curve of the losses"


@pytest.mark.parametrize("time", ["first", "again"])
def test_losses_are_on_the_node_afterwards(run: dict[str, Any], time: str) -> None:
    """Also where the graph was opened anew and the node did not have to run."""
    assert run["ended"] == ["execution_success"] * 2 and run["previews_again"] == 0
    node = run[time]
    assert node["natural"] == [480]
    seen = node["seen"]
    assert seen.width >= 300 and seen.height >= 150, "large enough to be looked at"
    assert pixels_like(seen, GROUND) > seen.width * 80, "the ground of the plot"
    assert pixels_like(seen, MEAN) > ANY, "the curve of the losses"


@pytest.mark.parametrize("time", ["first", "again"])
def test_the_node_stays_in_its_frame(run: dict[str, Any], time: str) -> None:
    """It grows with what it shows; the workflow leaves room for that."""
    assert run[time]["shownTo"] < run[time]["frameTo"]


@pytest.mark.parametrize("time", ["first", "again"])
def test_the_node_says_what_was_made(run: dict[str, Any], time: str, server: HostServer) -> None:
    steps, node = STEPS[run["name"]], run[time]
    about, at_last, written = node["text"].split("\n")
    assert re.search(r"[\d.]+ million numbers learn in about [\d.]+ GB", about)
    assert re.search(rf"^step {steps} of {steps}, loss \d\.\d+$", at_last)
    path = Path(re.fullmatch(r"written: (.+), [\d.]+ MB", written)[1])
    assert path.is_file() and server.base in path.parents
    left, top, width, height = node["textBox"]
    assert width > 200 and not node["hidden"], "the whole text is there to be read"
    assert not node["told"], "what was said before the run stands in the result, and once is enough"
    assert top + height <= node["shownTo"] + 1, "inside the node"


def test_the_video_is_there(run: dict[str, Any], server: HostServer) -> None:
    files = [file for output in run["outputs"].values() for file in output.get("images", [])]
    (video,) = (file for file in files if run["name"] in file["filename"])
    with av.open(str(server.base / video["type"] / video["subfolder"] / video["filename"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16
    assert frames[0].std() > 8, "the clip is flat"
