"""Client of the demo, run inside the environment: post a graph, follow it, fetch its video, draw a contact sheet.

    python scripts/make_clip.py --url URL --workflow FILE --folder FOLDER [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an embedded or isolated Python leaves it out

import aiohttp
import av
from console import Progress, bar, say
from PIL import Image

SHEET_COLUMNS = 4
SHEET_WIDTH = 1024
SHEET_GAP = 4
VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".mkv")


class GraphError(Exception):
    """The host refused or failed to run the graph; the message is the host's."""


def explain_refusal(answer: Any) -> str:
    """The sentences of a refused /prompt, one line per node that is wrong."""
    if not isinstance(answer, dict):
        return str(answer)
    lines = [answer.get("error", {}).get("message", "the graph was refused")]
    for node_id, node in answer.get("node_errors", {}).items():
        for error in node.get("errors", []):
            lines.append(f"node {node_id} ({node.get('class_type')}): {error.get('message')} {error.get('details')}")
    return "\n".join(lines)


async def follow(socket: aiohttp.ClientWebSocketResponse, prompt_id: str, prompt: dict, progress: Progress) -> None:
    """Show what the host reports until the graph has finished.

    Raises: GraphError when a node failed or the server went away.
    """
    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        kind, data = event["type"], event.get("data", {})
        if data.get("prompt_id", prompt_id) != prompt_id:
            continue
        if kind == "executing" and data.get("node"):
            progress.show(f"{bar(0, 1)} {prompt[data['node']]['class_type']}")
        elif kind == "progress":
            name = prompt.get(data.get("node"), {}).get("class_type", "")
            progress.show(f"{bar(data['value'], data['max'])} {name} {data['value']}/{data['max']}")
        elif kind == "execution_error":
            raise GraphError(f"{data['node_type']}: {data['exception_message']}")
        elif kind == "execution_interrupted":
            raise GraphError("the run was cancelled")
        elif kind == "execution_success":
            return
    raise GraphError("the server closed the connection")


async def run_graph(url: str, prompt: dict, progress: Progress) -> dict[str, Any]:
    """Queue `prompt`, follow it on the web socket, and return its outputs from /history."""
    client = uuid.uuid4().hex
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={client}") as socket:
        async with session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": client}) as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                raise GraphError(explain_refusal(answer))
        await follow(socket, answer["prompt_id"], prompt, progress)
        for _ in range(50):  # the history entry is written a moment after the event
            async with session.get(f"{url}/history/{answer['prompt_id']}") as response:
                history = await response.json()
            if answer["prompt_id"] in history:
                return history[answer["prompt_id"]]["outputs"]
            await asyncio.sleep(0.1)
    raise GraphError("the graph finished, but /history does not know it")


def videos_in(outputs: dict[str, Any]) -> list[dict[str, str]]:
    """Every video file named in the outputs of a graph."""
    files = [item for node in outputs.values() for values in node.values() for item in values if isinstance(item, dict)]
    return [file for file in files if file.get("filename", "").endswith(VIDEO_ENDINGS)]


async def download(url: str, file: dict[str, str], target: Path) -> None:
    """Fetch one output file through /view, written beside and renamed."""
    query = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
    async with aiohttp.ClientSession() as session, session.get(f"{url}/view", params=query) as response:
        response.raise_for_status()
        data = await response.read()
    partial = target.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(target)


def free_name(folder: Path, stem: str, ending: str) -> Path:
    """The first of stem_0001, stem_0002 ... that is not taken in `folder`; taken from here on, by an empty file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{stem}_{number:04d}{ending}"
        with contextlib.suppress(FileExistsError):
            path.open("x").close()
            return path


def contact_sheet(video: Path, target: Path) -> dict[str, Any]:
    """Write all frames of `video` side by side as a PNG; returns frames, width, height and frames per second."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)
        frames = [frame.to_image() for frame in container.decode(stream)]
    width, height = frames[0].size
    columns = min(SHEET_COLUMNS, len(frames))
    scale = min(1.0, SHEET_WIDTH / (columns * width))
    cell = (round(width * scale), round(height * scale))
    rows = -(-len(frames) // columns)
    step = (cell[0] + SHEET_GAP, cell[1] + SHEET_GAP)
    sheet = Image.new("RGB", (columns * step[0] - SHEET_GAP, rows * step[1] - SHEET_GAP), "white")
    for index, frame in enumerate(frames):
        sheet.paste(frame.resize(cell), (index % columns * step[0], index // columns * step[1]))
    sheet.save(target)
    return {"frames": len(frames), "width": width, "height": height, "fps": rate}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--workflow", required=True, type=Path)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    prompt = json.loads(options.workflow.read_text(encoding="utf-8"))
    progress = Progress(every=5.0)
    try:
        found = videos_in(asyncio.run(run_graph(options.url, prompt, progress)))
    except GraphError as error:
        say(f"\nThe graph {options.workflow.name} failed:\n{error}")
        return 1
    if not found:
        say(f"The graph {options.workflow.name} ran, but saved no video.")
        return 1
    seconds = progress.end("clip made")
    video = free_name(options.folder, options.workflow.stem, Path(found[0]["filename"]).suffix)
    try:
        asyncio.run(download(options.url, found[0], video))
    except BaseException:
        video.unlink()
        raise
    sheet = video.with_suffix(".png")
    facts = contact_sheet(video, sheet)
    say(f"\n{facts['frames']} frames of {facts['width']}x{facts['height']} at {facts['fps']:g} frames per second")
    say(f"video:         {video}\ncontact sheet: {sheet}")
    if options.json:
        facts |= {"video": str(video), "contact_sheet": str(sheet), "seconds": round(seconds, 2)}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # run.py, which waits for this, says so
        sys.exit(130)
