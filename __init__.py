"""ComfyUI-LatentMotion: video from image diffusion models, on ComfyUI's own samplers."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """Return the extension object ComfyUI registers; nothing is imported before it asks."""
    from .nodes import LatentMotionExtension

    return LatentMotionExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
