"""Latents of clips to pixels in bounded memory: temporal decoders exactly or streaming, other VAEs frame by frame."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..media.clip import Clip
from ..motion_modules.errors import ClipError, ModelMismatchError
from ..motion_modules.temporal_vae.decode import EXACT, STREAMING, Workshop, exact, streaming, work_units
from ..motion_modules.temporal_vae.footprint import footprint
from ..motion_modules.temporal_vae.plan import Temporal
from ..sampling.tiles import feather, tiles
from . import memory
from .decoder_plan import plan_of
from .preview import watching_page
from .unet import host_affine
from .video import StreamedVideo

TILE_SIZES, TILE_OVERLAP = (64, 32), 16  # latent pixels
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeSettings:
    """mode: EXACT or STREAMING. chunk: frames worked on at once. clip_length: frames per clip, 0: all are one clip."""

    mode: str = EXACT
    chunk: int = 4
    clip_length: int = 0


@dataclass
class _Way:
    """How the frames of one video are decoded; it lasts for all clips, so that they are alike.

    chunk: frames at once. tile: latent pixels, 0: whole frames. begun: some were given out, so `tile` stays. told: the
    user knows that there are fewer frames at once.
    """

    chunk: int
    tile: int = 0
    begun: bool = False
    told: bool = False

    @property
    def words(self) -> str:
        return f"in tiles of {self.tile} latent pixels" if self.tile else f"with {self.chunk} frames at once or fewer"


class ClipDecoder:
    """A VAE of the host that turns the latents of clips into pixels, some frames at a time."""

    def __init__(self, vae: comfy.sd.VAE, settings: DecodeSettings | None = None) -> None:
        """Raises ModelMismatchError for a VAE whose latents have a time axis of their own."""
        self.vae = vae
        self.page = watching_page()  # of the node that decodes; the work is done while another one saves
        self.settings = settings or DecodeSettings()
        if getattr(vae, "latent_dim", 2) != 2:
            raise ModelMismatchError(
                "This VAE has its own time axis, so its frames cannot be told apart before "
                "decoding. Use the VAE Decode node for it."
            )
        self.plan = plan_of(getattr(vae, "first_stage_model", None))

    @property
    def is_temporal(self) -> bool:
        """Whether the decoder looks across frames; otherwise both modes decode frame by frame."""
        return any(isinstance(step, Temporal) for step in self.plan or ())

    def size(self, latent: Tensor) -> tuple[int, int, int]:
        """Frames, height and width in pixels of what `frames` yields in all.

        Shapes: latent (v f, c, h, w). Raises ClipError for latents that do not fit the VAE or the clip length.
        """
        self._check(latent)
        scale = self.vae.spacial_compression_decode()
        return len(latent), latent.shape[2] * scale, latent.shape[3] * scale

    def frames(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode clip after clip; nothing is computed before the first chunk is asked for.

        Shapes: latent (v f, c, h, w) -> chunks (n, H, W, 3), n <= chunk, in order; float32 on the CPU, in [0, 1].
        Between two chunks the model may be unloaded, and Cancel is answered. Raises ClipError as `size`, and
        MemoryError where one frame at a time, or one tile, is too much.
        """
        self._check(latent)
        length = self.settings.clip_length or len(latent)
        clips = latent.split(length)
        progress = comfy.utils.ProgressBar(len(clips) * self._work(length))
        way = _Way(self._fitting(clips[0]))
        for clip in clips:
            yield from self._clip(clip, way, progress)

    def _check(self, latent: Tensor) -> None:
        length, channels = self.settings.clip_length, getattr(self.vae, "latent_channels", None)
        if latent.ndim != 4:
            raise ClipError(
                f"These latents have {latent.ndim} axes; a batch of frames (frames, channels, height, "
                "width) is needed. Latents with a time axis belong to VAE Decode."
            )
        if channels is not None and latent.shape[1] != channels:
            raise ClipError(
                f"These latents have {latent.shape[1]} channels and this VAE decodes {channels}. Use the "
                "VAE of the model that made them."
            )
        if length and len(latent) % length:
            raise ClipError(
                f"{len(latent)} frames are no whole number of clips of {length}. Set clip_length to 0 if "
                "they are one clip."
            )

    def _work(self, frames: int) -> int:
        return work_units(self.plan, frames, self.settings.mode == STREAMING) if self.is_temporal else frames

    def _fitting(self, clip: Tensor) -> int:
        """Frames at once that fit into memory beside the weights, at most those asked for; shown on the node."""
        vae, most = self.vae, max(1, min(self.settings.chunk, len(clip)))
        need = partial(self.bytes_needed, clip)
        load = comfy.model_management.load_models_gpu  # makes room, and what is free then counts
        load([vae.patcher], memory_required=need(most), force_full_load=vae.disable_offload)
        chunk, line = memory.fitting(most, need, vae.device, "decoding")
        self._check_ram(clip, chunk)
        if self.page is not None:
            self.page.say(line)
        return chunk

    def _check_ram(self, clip: Tensor, chunk: int) -> None:
        """Raise MemoryError where frames that wait are more than RAM holds, as systems end whole programs then."""
        if self.plan is None or self.settings.mode == STREAMING or not self.is_temporal:
            return
        peak = footprint(self.plan, tuple(clip.shape), chunk, False).peak * self.vae.vae_dtype.itemsize
        waiting = memory.beyond(peak, self.vae.device)
        free = comfy.model_management.get_free_memory(torch.device("cpu"))
        if waiting > free:
            raise MemoryError(
                f"To decode {len(clip)} frames exactly takes about {waiting / 2**30:.1f} GiB of RAM, and "
                f"{free / 2**30:.1f} GiB are free. Set mode to 'streaming', which takes the same for any length, or "
                "clip_length to fewer frames. The latents are kept."
            )

    def bytes_needed(self, clip: Tensor, chunk: int) -> int:
        """Bytes of decoding so many frames of a clip at once; of builds it does not know as the host estimates them.

        Parked frames are among them where they can only lie in RAM.
        """
        if self.plan is None:
            return int(self.vae.memory_used_decode((1, *clip.shape[1:]), self.vae.vae_dtype)) * chunk
        found = footprint(self.plan, tuple(clip.shape), chunk, self.settings.mode == STREAMING)
        return (found.peak if self.vae.device.type == "cpu" else found.working) * self.vae.vae_dtype.itemsize

    def _clip(self, clip: Tensor, way: _Way, progress: comfy.utils.ProgressBar) -> Iterator[Tensor]:
        """One clip; where memory runs out, again with less of it at once, as `_lessen` says.

        What was given out already is decoded anew and dropped.
        """
        given = 0
        while True:
            try:
                past = 0
                for pixels in self._pieces(clip, way, progress.update):
                    fresh = pixels[max(given - past, 0) :]
                    past += len(pixels)
                    if len(fresh):
                        given, way.begun = past, True
                        yield fresh
                return
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                failure = str(error)
            self._lessen(clip, way, failure)  # outside the handler: the error held the failed call's tensors
            comfy.model_management.soft_empty_cache()

    def _lessen(self, clip: Tensor, way: _Way, failure: str) -> None:
        """Fewer frames at once, and tiles once a single one is too many and none has been given out.

        A tile has norm statistics of its own, so tiles in the middle of a video would be a step in its brightness.
        Raises MemoryError where nothing is left that keeps the frames alike.
        """
        if way.chunk > 1:
            way.chunk //= 2
        elif way.begun:
            raise MemoryError(
                f"Memory ran out in the middle of the video, with one frame at a time ({failure}). Smaller pieces of a "
                "frame would change the brightness from here on, so decoding ends. The latents are kept: close other "
                "programs and queue again, which does not sample again, or start ComfyUI with --cpu-vae."
            )
        else:
            sizes = (size for size in TILE_SIZES if size < max(clip.shape[2:]) and not 0 < way.tile <= size)
            way.tile = next(sizes, 0)
            if not way.tile:
                raise MemoryError(
                    f"There is not enough memory to decode one frame, not even in tiles ({failure}). Close other "
                    "programs, make smaller frames, or start ComfyUI with --cpu-vae."
                )
        if way.tile or not way.told:
            log.warning("Out of memory while decoding; going on %s.", way.words)
        way.told = True
        if way.tile and self.page is not None:
            self.page.say(f"decoding {way.words}, which changes brightness a little")

    def _pieces(self, clip: Tensor, way: _Way, on_frames: Callable[[int], Any]) -> Iterator[Tensor]:
        if not way.tile:
            yield from self._run(clip, way.chunk, on_frames)
            return
        for part in [clip] if self.is_temporal else clip.split(way.chunk):
            yield from self._tiled(part, way, on_frames)

    def _tiled(self, clip: Tensor, way: _Way, on_frames: Callable[[int], Any]) -> Iterator[Tensor]:
        """All frames of one tile after the other, blended over the overlaps.

        The pixels of all these frames wait in RAM, 12 bytes each, in both modes: a temporal decoder gives the frames
        of one tile in one go, and what it keeps to go on with every tile in turn is as large as that of a whole frame.
        """
        frames, height, width = self.size(clip)
        scale = self.vae.spacial_compression_decode()
        canvas, total = torch.zeros(frames, 3, height, width), torch.zeros(height, width)
        for tile in tiles(*clip.shape[2:], way.tile, TILE_OVERLAP):
            weight = feather(tile, *clip.shape[2:], TILE_OVERLAP, scale)
            tile.of(total, scale).add_(weight)
            start = 0
            for pixels in self._run(tile.of(clip), way.chunk, on_frames):
                part = tile.of(canvas[start : start + len(pixels)], scale)
                part.addcmul_(pixels.movedim(-1, 1), weight)
                start += len(pixels)
        yield from canvas.div_(total).movedim(1, -1).split(self.settings.chunk)

    def _run(self, clip: Tensor, chunk: int, on_frames: Callable[[int], Any]) -> Iterator[Tensor]:
        vae, needed = self.vae, self.bytes_needed(clip, chunk)
        shop = Workshop(chunk, partial(memory.park, reserve=needed), host_affine, on_frames)
        pieces = self._decoded(clip.to(vae.device, vae.vae_dtype), shop)
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            load = comfy.model_management.load_models_gpu
            load([vae.patcher], memory_required=needed, force_full_load=vae.disable_offload)
            with torch.inference_mode():
                pixels = next(pieces, None)
                if pixels is None:
                    return
                pixels = vae.process_output(pixels.float()).movedim(1, -1).to("cpu", torch.float32)
            yield pixels

    def _decoded(self, clip: Tensor, shop: Workshop) -> Iterator[Tensor]:
        """What the network makes of a clip, chunk by chunk, on its device and in its own range."""
        if self.is_temporal:
            yield from (streaming if self.settings.mode == STREAMING else exact)(self.plan, clip, shop)
            return
        for part in clip.split(shop.chunk):
            yield self.vae.first_stage_model.decode(part)
            shop.on_frames(len(part))


def decode_video(
    vae: comfy.sd.VAE, samples: dict[str, Any], frame_rate: Fraction, settings: DecodeSettings
) -> StreamedVideo:
    """All frames of a LATENT as a VIDEO, decoded while something saves or collects it. Raises as ClipDecoder."""
    decoder, latent = ClipDecoder(vae, settings), samples["samples"]
    return StreamedVideo(Clip(*decoder.size(latent), frame_rate, partial(decoder.frames, latent), shows_progress=True))
