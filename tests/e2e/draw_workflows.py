"""Draw the canvas workflows from the API ones, in the real front end.

    COMFYUI_PATH=... python tests/e2e/draw_workflows.py [NAME ...]

Writes workflows/<name>.json for every layout below (or those named); titles and values are the API graph's. Where there
is no thumbnail yet, it is a picture of the graph (picture_workflows.py makes one of the clip).
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from demo_clips import provide_clips  # noqa: E402
from front_end import FrontEnd  # noqa: E402
from host_server import HostServer  # noqa: E402
from picture_workflows import save_small  # noqa: E402
from PIL import Image  # noqa: E402

GAP_X, GAP_Y, BAND_GAP, TITLE, MARGIN = 70, 30, 90, 30, 20
WIDTH, PROMPT_SIZE = 300, (380, 110)
SIZES = {
    "SaveVideo": (380, 490),
    "LatentMotionSaveVideo": (380, 490),
    "LatentMotionPromptTravel": (380, 230),
    "LatentMotionLoadVideo": (340, 660),
    "PreviewAny": (380, 220),
}
# Of nodes that show something below their widgets: a width at which it can be read, and room for it.
SHOWING = {
    "LatentMotionTrainMotionLora": (400, 350),
    "LatentMotionTrainDomainAdapter": (400, 300),
    "LatentMotionTrainMotionModule": (400, 350),
    "LatentMotionTuneVideoModel": (400, 300),
    "LatentMotionDDIMInversion": (WIDTH, 260),
}
NOTE_WIDTH, NOTE_LETTERS, NOTE_LINE = 340, 52, 16  # letters in a line of the note, and its height
PROMPT_COLOURS = {"Negative prompt": ("#322", "#533")}
GREEN, BROWN = ("#232", "#353"), ("#432", "#653")
DROPPED_KEYS = {"localized_name", "slot_index"}
THUMBNAIL_WIDTH = 840
FRAME = "#3f789e"
NOTE = "note"


@dataclass(frozen=True)
class Layout:
    """Bands from top to bottom, of columns from left to right, of node ids from top to bottom.

    note: text of the note. titles: of a frame round each band, none by default.
    """

    bands: tuple[tuple[tuple[int | str, ...], ...], ...]
    note: str
    titles: tuple[str, ...] = ()


LAYOUTS = {
    "text_to_video": Layout(
        (((NOTE, 1, 2), (3, 4, 5, 6), (7,), (8, 9), (10,)),),
        "**Text to video**\n\nThe motion module makes the image model draw 16 frames that belong together. The demo "
        "models know coloured shapes that move right, left, up or down.\n\nFor real videos, replace *Load Demo Models* "
        "by *Load Checkpoint*, choose a motion module for that checkpoint, and set width and height to 512 and cfg to "
        "about 7: 128 x 128 and cfg 2 suit only the demo.",
    ),
    "motion_lora": Layout(
        (((NOTE, 1, 2), (11, 4, 5, 6), (3,), (7,), (8, 9), (10,)),),
        "**MotionLoRA**\n\nA MotionLoRA changes how the motion module moves things; this one zooms in. Try a strength "
        "below 0, the zoom_out file, or two Load MotionLoRA nodes one after the other.",
    ),
    "train_motion_lora": Layout(
        (((NOTE, 1, 2), (4, 5, 11), (12,), (13, 15)), ((14,), (3, 6), (7,), (8, 9), (10,))),
        "**Train MotionLoRA**\n\nThe image model draws eight stills, *Camera Motion Clips* zooms into them, and *Train "
        "MotionLoRA* teaches the motion module that zoom. 16 steps only show how it works. On the demo models, 300 "
        "steps with batch_size 4 and high_noise_weight 200, on 48 stills, taught the zoom. *Cancel* keeps what was "
        "learned; run again to go on.\n\nFor pictures or videos of your own, connect *Load Video Dataset* to *clips* "
        "of *Camera Motion Clips* and empty its *captions*.",
        ("Reference clips", "Training, and a clip with the new MotionLoRA"),
    ),
    "train_motion_module": Layout(
        (((NOTE, 1), (11,), (12,), (13,)), ((2, 4, 5), (14,), (3, 6), (7,), (8, 9), (10,))),
        "**Train a motion module**\n\nThe stages of AnimateDiff before a MotionLoRA. *Train Domain Adapter* learns how "
        "single frames of the videos look. With it in place, *Train Motion Module* learns how things move, here from "
        "the demo's module on; the clip is made without the adapter.\n\n8 steps on one clip only show how it works: "
        "real ones take thousands of videos and steps. For videos of your own, name their folder in *Load Video "
        "Dataset*. To begin with a new module, take away the link to *motion_module*.",
        ("Stage 1: how single frames look", "Stage 2: how things move, and a clip with the new motion module"),
    ),
    "image_lora_and_motion": Layout(
        (((NOTE, 1, 2), (11,), (3, 4, 5, 6), (7,), (8, 9), (10,)),),
        "**Image LoRA and motion**\n\nLoRAs for the image model are loaded before the motion module is applied. The "
        "one here is the demo's domain adapter: at strength 1 it brings back the look of the training clips, with "
        "their overlay; at 0 the clip is clean.",
    ),
    "long_clip": Layout(
        (((NOTE, 1, 2), (4, 5, 6), (3, 11), (7,), (8, 9), (10,)),),
        "**Long clip**\n\n*Sliding Context* samples clips longer than the motion module knows, here 48 frames with a "
        "module of 16: window by window, and where windows overlap they are averaged. The memory is that of one "
        "window, however large batch_size is. The picture on the node shows the windows.\n\nEvery window makes the "
        "whole movement of its prompt, so each part of the clip has one of its own: a keyframe where a window begins, "
        "every 12 frames.",
    ),
    "prompt_travel": Layout(
        (((NOTE, 1, 2), (4, 5, 6), (3, 11, 12), (7,), (8, 9), (10,)),),
        "**Prompt travel**\n\nEach line of *Prompt Travel* says what one frame shows; the frames between two lines are "
        "mixed. Here a red circle goes right and comes back, and turns into a green square on the way.\n\nAfter a "
        "run, the table lists what every frame sees. The negative prompt is a CLIP Text Encode as always.",
    ),
    "continue_a_clip": Layout(
        (((NOTE, 1, 2), (3, 4, 5, 6), (11,), (7,), (8, 9), (10,)),),
        "**Continue a clip**\n\nTwo clips of 16 frames in one sampling run. The second starts from the first one's "
        "noise in reverse, and its first frames are led by the first clip's last ones: it begins where the first ended "
        "and tends to go back. So its prompt, from frame 16 on, says so. Raise batch_size to 48 for three clips.\n\n"
        "The sampler must keep nothing from step to step: euler, ddim or lcm, not dpmpp_2m. To go on from a clip you "
        "have, see the workflow *continue_a_video*.",
    ),
    "continue_a_video": Layout(
        (((NOTE, 1, 2), (4,), (5, 6), (3, 7), (8,)), ((10, 11, 12), (9,), (13,), (14, 15), (16,), (17,))),
        "**Continue a video**\n\n*DDIM Inversion* finds the noise of a video's last 16 frames, and *Reuse and Diffuse* "
        "starts 16 new ones from it in reverse and leads them away from the last frame: they begin where the video "
        "ends. *Latent Batch* puts the two together.\n\nA clip that was started so tends to go back, so the new "
        "prompt says so. For a video of your own, upload it on *Load Video (Lazy)*, say in the upper prompt what it "
        "shows, and load its end: skip_frames leaves out what comes before.\n\nA latent that was sampled can go "
        "straight to *continue_from*, without the upper row.",
        ("A video, up to its noise", "The video goes on"),
    ),
    "stream_to_file": Layout(
        (((NOTE, 1, 2), (4, 5, 6), (3, 11), (7,), (8,), (10,)),),
        "**Stream to file**\n\n*Temporal VAE Decode* gives a video that is decoded while *Save Video (Formats)* writes "
        "it, a few frames at a time, so the length of the clip does not matter. If saving fails, the sampled latents "
        "are still there.\n\nWith an SVD checkpoint's VAE or one from *Load Temporal VAE* neighbouring frames "
        "also agree.",
    ),
    "edit_a_video": Layout(
        (((NOTE, 1, 2), (4, 5, 6), (3,), (7,), (11,)), ((16, 12), (13,), (14, 15), (8, 9), (10,))),
        "**Edit a video**\n\n*DDIM Inversion* finds the noise from which the model samples a clip that is there. "
        "Sampled from it with another prompt, the clip keeps its motion and layout. The node shows how close the clip "
        "comes back without edits.\n\nFor a video of your own, put *Load Video (Lazy)* and *Get Video Components* "
        "before *VAE Encode*, in place of the upper row's sampler. Leave add_noise off: the latent is noisy already.",
        ("A clip to edit", "Up to its noise, and down again with another prompt"),
    ),
    "tune_a_video": Layout(
        (((NOTE, 1), (2,), (3, 5), (4,)), ((6, 8, 9), (7,), (10,), (11, 12), (13,))),
        "**Tune a video**\n\n*Tune Video Model* teaches the image model one clip and its prompt (Tune-A-Video). "
        "Sampled from the clip's own noise with another prompt, the clip moves as before and shows what the words "
        "say: here a green circle in place of a red one.\n\n16 steps only show how it works: set steps to 60 for "
        "these models, 500 with a learning rate of 0.00003 for real ones. *Cancel* keeps what was learned; run again "
        "to go on. For a clip of your own, upload it on *Load Video (Lazy)*, say what it shows in *prompt*, and choose "
        "another *file_name*.",
        ("A clip, and the model that learns it", "Up to its noise, and down again with another prompt"),
    ),
    "image_to_video": Layout(
        (((NOTE, 1, 2), (4, 5, 11), (12,), (6,)), ((3,), (7,), (8, 9), (10,))),
        "**Image to video**\n\nThe first KSampler draws one image; its latent is repeated for 16 frames and sampled "
        "again with motion at a denoise below 1. Lower it to stay closer to the image, raise it to move more.\n\nFor "
        "an image of your own, put *Load Image* and *VAE Encode* before *Repeat Latent Batch*.",
        ("One image, repeated", "A clip from it"),
    ),
    "video_with_controlnet": Layout(
        (((NOTE, 1, 2), (3,), (14, 5, 6), (11,), (12, 13)), ((4, 15), (16,), (7,), (8, 9), (10,))),
        "**Video with ControlNet**\n\nThe edges of a first clip, one picture per frame, steer a second clip of other "
        "colours along the same path.\n\nThe ControlNet here belongs to the demo models. With a real checkpoint, "
        "choose a canny ControlNet for it.",
        ("First clip and its edges", "Second clip, along those edges"),
    ),
    "video_to_video": Layout(
        (((NOTE,), (6,), (7,), (8, 9)), ((1, 2, 10), (4, 5), (3, 11), (12,), (13,), (14,))),
        "**Video to video**\n\nA video is encoded, made noisy and sampled again with motion: *denoise* says how much "
        "of it may change. The edges of its frames keep things in place. Here the demo's clip of a red circle is to "
        "become a green one; upload your own with the button on *Load Video (Lazy)*. The sound of the video is saved "
        "with the new one.\n\nThe ControlNet here belongs to the demo models. With a real checkpoint, choose "
        "a canny ControlNet for it and set width and height to the checkpoint's size.",
        ("A video, its frames and their edges", "The same video, drawn anew"),
    ),
}

ARRANGE = """([prompt, name, note]) => {
    app.loadApiJson(prompt, name);
    const text = LiteGraph.createNode("MarkdownNote");
    app.graph.add(text);
    text.title = "What this does";
    text.widgets[0].value = note;
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === "control_after_generate") widget.value = "fixed";
    return app.graph.nodes.map((node) => [node.id, node.type, node.title, ...node.computeSize()]);
}"""
PLACE = """(boxes) => {
    for (const {id, pos, size, colours} of boxes) {
        const node = app.graph.getNodeById(id);
        node.pos = pos;
        node.setSize(size);
        [node.color, node.bgcolor] = colours ?? [undefined, undefined];
    }
    return app.graph.serialize();
}"""
# Edges of the nodes and frames on the page, with a margin: left, top, right, bottom.
SEEN = """() => {
    const {scale, offset} = app.canvas.ds, around = app.canvas.canvas.getBoundingClientRect();
    const boxes = [...app.graph.nodes, ...app.graph.groups].map((item) => [...item.pos, ...item.size]);
    const least = (axis) => Math.min(...boxes.map((box) => box[axis]));
    const most = (axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2]));
    return [least(0) - 30, least(1) - 60, most(0) + 30, most(1) + 30]
        .map((place, index) => (place + offset[index % 2]) * scale + (index % 2 ? around.top : around.left));
}"""


def note_height(text: str) -> int:
    """Of a note that shows its whole text."""
    lines = [max(1, -(-len(line) // NOTE_LETTERS)) for line in text.split("\n")]
    return NOTE_LINE * (sum(lines) + 2)


def box_of(kind: str, title: str, width: float, height: float, note: str) -> dict[str, Any]:
    """Size and colours of a node."""
    if kind == "MarkdownNote":
        return {"size": (NOTE_WIDTH, note_height(note)), "colours": BROWN}
    if kind == "CLIPTextEncode":
        return {"size": PROMPT_SIZE, "colours": PROMPT_COLOURS.get(title, GREEN)}
    if kind in SHOWING:
        return {"size": (SHOWING[kind][0], height + SHOWING[kind][1])}
    if kind in SIZES:
        return {"size": SIZES[kind], "colours": GREEN if kind == "LatentMotionPromptTravel" else None}
    return {"size": (max(WIDTH, width), height)}


def placed(layout: Layout, nodes: list[list[Any]]) -> list[dict[str, Any]]:
    """Every node with its position; the nodes of a column are made equally wide."""
    boxes = {NOTE if kind == "MarkdownNote" else number: {"id": number} | box_of(kind, title, *size, layout.note)
             for number, kind, title, *size in nodes}  # fmt: skip
    told = [key for band in layout.bands for column in band for key in column]
    assert sorted(map(str, boxes)) == sorted(map(str, told)), "a layout names every node once"
    top = 0.0
    for band in layout.bands:
        left, bottom = 0.0, top
        for column in band:
            width, below = max(boxes[key]["size"][0] for key in column), top
            for key in column:
                height = boxes[key]["size"][1]
                boxes[key] |= {"pos": (left, below + TITLE), "size": (width, height)}
                below += TITLE + height + GAP_Y
            left, bottom = left + width + GAP_X, max(bottom, below)
        top = bottom + BAND_GAP
    return list(boxes.values())


def frames(layout: Layout, boxes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A titled frame round each band, where the layout has titles."""
    by_id = {box["id"]: box for box in boxes}
    found = []
    for number, (band, title) in enumerate(zip(layout.bands, layout.titles, strict=False), 1):
        inside = [by_id[key] for column in band for key in column if key in by_id]
        left, top = (min(box["pos"][axis] for box in inside) for axis in (0, 1))
        right, bottom = (max(box["pos"][axis] + box["size"][axis] for box in inside) for axis in (0, 1))
        width, height = right - left + 2 * MARGIN, bottom - top + TITLE + 3 * MARGIN
        bounding = [left - MARGIN, top - TITLE - 2 * MARGIN, width, height]
        found.append({"id": number, "title": title, "bounding": bounding, "color": FRAME, "font_size": 24, "flags": {}})
    return found


def slim(value: Any) -> Any:
    """Without keys that are null or that the front end fills in again."""
    if isinstance(value, dict):
        return {key: slim(item) for key, item in value.items() if item is not None and key not in DROPPED_KEYS}
    return [slim(item) for item in value] if isinstance(value, list) else value


def tidied(name: str, graph: dict[str, Any]) -> dict[str, Any]:
    """A serialised graph as it is kept: without the view, with an id that follows from its name, inputs keep `link`."""
    kept = slim(graph)
    for node in kept["nodes"]:
        for item in node.get("inputs", []):
            item.setdefault("link", None)
    kept["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"latentmotion/{name}"))
    kept["extra"] = {}
    return kept


def as_text(graph: dict[str, Any]) -> str:
    """JSON with one line per node and link, so that changes can be read."""
    rows = []
    for key, value in graph.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(f"  {json.dumps(item)}" for item in value)
            rows.append(f"{json.dumps(key)}: [\n{lines}\n ]")
        else:
            rows.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(rows) + "\n}\n"


def picture_graph(front_end: FrontEnd, path: Path) -> None:
    """Open a workflow and save what a person sees of it as its thumbnail."""
    front_end.open(path)
    left, top, right, bottom = front_end.evaluate(SEEN)
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    seen = Image.open(io.BytesIO(front_end.page.screenshot(clip=clip))).convert("RGB")
    size = (THUMBNAIL_WIDTH, round(seen.height * THUMBNAIL_WIDTH / seen.width))
    save_small(seen.resize(size, Image.Resampling.LANCZOS), path.with_suffix(".jpg"))


def draw(front_end: FrontEnd, name: str) -> Path:
    """Draw one workflow and write it."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    nodes = front_end.evaluate(ARRANGE, [prompt, name, LAYOUTS[name].note])
    boxes = placed(LAYOUTS[name], nodes)
    graph = front_end.evaluate(PLACE, boxes)
    graph["groups"] = frames(LAYOUTS[name], boxes)
    path = ROOT / "workflows" / f"{name}.json"
    path.write_text(as_text(tidied(name, graph)), encoding="utf-8")
    if not path.with_suffix(".jpg").is_file():
        picture_graph(front_end, path)
    return path


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as base:
        provide_clips(Path(base))
        server = HostServer(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), Path(base))
        with server, FrontEnd(server, os.environ.get("CHROMIUM", "/usr/bin/chromium")) as front_end:
            for name in names or LAYOUTS:
                draw(front_end, name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
