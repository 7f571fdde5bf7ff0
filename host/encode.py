"""Pictures of a film to latents in bounded memory: the same latents whatever memory there is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..media.clip import Clip
from ..motion_modules.errors import ModelMismatchError
from . import memory
from .preview import watching_page
from .video import clip_of, watch

ENCODED_AT_ONCE = 8
TILED = "in tiles, which changes their brightness a little"
log = logging.getLogger(__name__)


def encode_video(vae: Any, video: Any) -> dict[str, Tensor]:
    """The pictures of a VIDEO or IMAGE as a LATENT; of a VIDEO a few are in memory at a time.

    Raises ModelMismatchError for a VAE whose latents have a time axis of their own.
    """
    if getattr(vae, "latent_dim", 2) != 2:
        raise ModelMismatchError("This VAE has its own time axis and takes the whole clip at once. Use the VAE Encode "
                                 "node for it.")  # fmt: skip
    film = clip_of(video)
    on_frame = watch(film)

    def chunks() -> Iterator[Tensor]:
        done = 0
        for chunk in film.chunks():
            yield chunk
            done += len(chunk)
            on_frame(done)

    return {"samples": encode_frames(vae, replace(film, chunks=chunks))}


def encode_frames(vae: Any, film: Clip, at_once: int = ENCODED_AT_ONCE) -> Tensor:
    """Every picture of a film as the host's VAE Encode makes it. Shapes: -> (frames, c, h, w), float32 on the CPU.

    at_once: most pictures in one call of the network; fewer where memory runs out, which changes nothing. The host
    itself goes over to tiles for the call that failed, and as tiles have norm statistics of their own, its frames would
    differ from their neighbours. Here tiles come only where one picture is too many, and then for the whole film.
    Raises the host's error where even tiles are too large. Cancel is answered between two calls.
    """
    made = _whole_pictures(vae, film, at_once)
    if made is None:
        log.warning("Out of memory while encoding one picture; all of the film are encoded %s.", TILED)
        page = watching_page()
        if page is not None:
            page.say(f"encoding {TILED}")
        made = [_tiled(vae, picture) for chunk in film.chunks() for picture in chunk.split(1)]
    with torch.inference_mode(False):
        return torch.cat([part.clone() for part in made])


def _whole_pictures(vae: Any, film: Clip, at_once: int) -> list[Tensor] | None:
    """None where one picture is too many."""
    made, told = [], False
    for chunk in film.chunks():
        while len(chunk):
            tried = min(at_once, len(chunk))
            part = _encoded(vae, chunk[:tried])
            if part is not None:
                made.append(part)
                chunk = chunk[tried:]
                continue
            comfy.model_management.soft_empty_cache()
            if tried == 1:
                return None
            at_once = tried // 2
            if not told:
                log.warning("Out of memory while encoding; going on with fewer pictures at once. The latents stay the "
                            "same, it takes a little longer.")  # fmt: skip
            told = True
    return made


def _encoded(vae: Any, pictures: Tensor) -> Tensor | None:
    """What the host's VAE Encode computes, but None where memory runs out. Shapes: (n, H, W, 3) -> (n, c, h, w)."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    if getattr(vae, "latent_dim", 0) != 2:
        return vae.encode(pictures).float().cpu()  # not frame by frame, or not the host's
    vae.throw_exception_if_invalid()
    pixels = vae.vae_encode_crop_pixels(pictures[..., :3]).movedim(-1, 1)
    needed = vae.memory_used_encode((1, *pixels.shape[1:]), vae.vae_dtype) * len(pixels)
    load = comfy.model_management.load_models_gpu
    load([vae.patcher], memory_required=needed, force_full_load=vae.disable_offload)
    try:
        return vae.first_stage_model.encode(vae.process_input(pixels).to(vae.vae_dtype).to(vae.device)).float().cpu()
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
    return None


def _tiled(vae: Any, picture: Tensor) -> Tensor:
    comfy.model_management.throw_exception_if_processing_interrupted()
    return vae.encode_tiled(picture[..., :3]).float().cpu()
