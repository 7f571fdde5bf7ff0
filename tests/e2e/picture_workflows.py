"""Run the API workflows on a server, and make their thumbnails and the moving picture of the README.

    COMFYUI_PATH=... python tests/e2e/picture_workflows.py [NAME ...]

Writes workflows/<name>.jpg (four frames) for all or those named, and workflows/clips.webp, some of them playing side by
side, when all are made.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from host_server import HostServer  # noqa: E402

FOLDER = ROOT / "workflows"
SIDE, GAP = 252, 8  # of a frame on a picture, in pixels; between two of them
MOST_BYTES = 40_000
ROW = ("text_to_video", "motion_lora", "video_with_controlnet", "image_to_video")  # 16 frames each


def frames_of(server: HostServer, entry: dict[str, Any]) -> list[Image.Image]:
    """Every frame of the video that a /history entry names."""
    files = [item for output in entry["outputs"].values() for item in output.get("images", [])]
    (item,) = (file for file in files if file["filename"].endswith(".mp4"))
    with av.open(str(server.base / item["type"] / item["subfolder"] / item["filename"])) as container:
        return [frame.to_image().resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in container.decode(video=0)]


def side_by_side(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows on white."""
    rows, step = -(-len(pictures) // columns), SIDE + GAP
    sheet = Image.new("RGB", (columns * step - GAP, rows * step - GAP), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * step, index // columns * step))
    return sheet


def save_small(picture: Image.Image, path: Path) -> None:
    """Write a JPEG, as good as fits."""
    for quality in range(92, 20, -4):
        picture.save(path, quality=quality)
        if path.stat().st_size <= MOST_BYTES:
            return


def save_thumbnail(frames: list[Image.Image], path: Path) -> None:
    """Four frames from the first to the last."""
    last = len(frames) - 1
    save_small(side_by_side([frames[round(last * third / 3)] for third in range(4)], 2), path)


def save_clips(clips: list[list[Image.Image]], path: Path) -> None:
    """Clips playing beside each other, eight frames per second, without end."""
    rows = [side_by_side(list(moment), len(clips)) for moment in zip(*clips, strict=True)]
    rows[0].save(path, save_all=True, append_images=rows[1:], duration=125, loop=0, quality=80, method=6)


def main(names: list[str]) -> int:
    clips = {}
    with tempfile.TemporaryDirectory() as base:
        with HostServer(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), Path(base)) as server:
            for name in names or sorted(path.stem for path in (FOLDER / "api").glob("*.json")):
                entry = server.run(json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8")), 3600)
                clips[name] = frames_of(server, entry)
                save_thumbnail(clips[name], FOLDER / f"{name}.jpg")
    if not names:
        save_clips([clips[name] for name in ROW], FOLDER / "clips.webp")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
