"""Workflow and prompt inside a file, in the form that ComfyUI's canvas finds again when the file is dropped on it."""

from __future__ import annotations

import json
import re
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
# The canvas looks for these: see the host's own WebP saver.
EXIF_PROMPT, EXIF_FIRST_OTHER = 0x0110, 0x010F


def as_json(value: Any) -> str:
    """ASCII JSON in whose texts braces are written as escapes.

    For WEBM the canvas finds the end by counting braces, without a look at quotes, so a prompt such as "{red|blue"
    would hide the graph.
    """
    text = value if isinstance(value, str) and value[:1] in "{[" else json.dumps(value)
    return JSON_STRING.sub(lambda found: found[0].replace("{", "\\u007b").replace("}", "\\u007d"), text)


def tags(metadata: dict[str, Any]) -> dict[str, str]:
    """Tags of a container."""
    return {name: as_json(value) for name, value in metadata.items()}


def exif(metadata: dict[str, Any]) -> Image.Exif:
    """EXIF entries of a WebP: the prompt in one, what else there is in the ones before it."""
    found, tag = Image.Exif(), EXIF_FIRST_OTHER
    for name, value in metadata.items():
        if name == "prompt":
            found[EXIF_PROMPT] = f"prompt:{as_json(value)}"
        else:
            found[tag] = f"{name}:{as_json(value)}"
            tag -= 1
    return found


def png_texts(metadata: dict[str, Any]) -> PngInfo:
    """Text chunks of a PNG."""
    found = PngInfo()
    for name, value in metadata.items():
        found.add_text(name, as_json(value))
    return found
