"""ComfyUI-LatentMotion: video from image diffusion models, on ComfyUI's own samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import LatentMotionExtension

WEB_DIRECTORY = "./js"


async def comfy_entrypoint() -> LatentMotionExtension:
    """Return the extension object ComfyUI registers; nothing is imported before it asks."""
    from .nodes import LatentMotionExtension

    return LatentMotionExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
