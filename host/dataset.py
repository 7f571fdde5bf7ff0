"""Data sets of the graph: made from folders and clips, and turned into latents piece by piece."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..media.clip import Clip
from ..media.geometry import Fit, Frame
from ..media.timing import Selection
from ..motion_modules.errors import TrainingError, check_choice
from ..training.camera import CameraWork, Move, camera_clips, end_to_end
from ..training.checkpoint import load_weights, save_weights
from ..training.clips import Clips
from ..training.dataset import Dataset, Film, film_of_parts, join, with_mirrored
from ..training.folder import Reading, media_files, read_folder
from .video import DEMO_CLIPS, StreamedVideo, clip_of

FROM_GRAPH = "The clip"
MOVES = [move.value for move in Move]
STILLS, MOVING = "stills", "clips"
SOURCES = [STILLS, MOVING]
DEMO_FOLDER = "latentmotion_demo_clips"
"""Stands for the clips that come with the pack, where the input folder has none of that name."""
log = logging.getLogger(__name__)


def locate_folder(folder: str) -> Path:
    """A folder by its path, or by its name in the host's input folder. Raises TrainingError for no name."""
    inputs = Path(folder_paths.get_input_directory())
    if folder.strip() == DEMO_FOLDER and not (inputs / DEMO_FOLDER).exists():
        return DEMO_CLIPS
    if not folder.strip():
        raise TrainingError("No folder is named. Write the folder your videos are in: its path, or its name in "
                            f"{inputs}.")  # fmt: skip
    return inputs / Path(folder.strip()).expanduser()


def known_folder(folder: str | None) -> bool | str:
    """True, or the sentence for a folder without videos; None (linked) is not known yet."""
    try:
        return folder is None or bool(media_files(locate_folder(folder)))
    except TrainingError as error:
        return str(error)


def state_of_folder(folder: str) -> list[tuple[str, float, int]]:
    """What changes when a video, a caption or a table of the folder does."""
    root = locate_folder(folder)
    captions = [*root.glob("*.csv"), *root.rglob("*.txt")]
    found = [(path.relative_to(root).as_posix(), path.stat()) for path in [*media_files(root), *captions]]
    return sorted((name, state.st_mtime, state.st_size) for name, state in found)


def load_dataset(folder: str, *, caption: str, frame_rate: float, width: int, height: int, fit: str, split_shots: bool,
                 shot_threshold: float, frame_cap: int, mirror: bool = False) -> Dataset:  # fmt: skip
    """Translate the widgets of Load Video Dataset. Raises TrainingError, VideoError and ValueError."""
    selection = Selection(Fraction(frame_rate).limit_denominator(1001), cap=frame_cap)
    how = Reading(selection, Frame(height, width, Fit(fit)), caption, split_shots, shot_threshold)
    root = locate_folder(folder)
    bar = comfy.utils.ProgressBar(len(media_files(root)))

    def on_file(number: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(number, total)

    stop = comfy.model_management.throw_exception_if_processing_interrupted
    found = read_folder(root, how, on_file, lambda frame: stop())
    return with_mirrored(found) if mirror else found


def dataset_of(clips: Any, captions: str = "", clip_length: int = 0) -> Dataset:
    """What a node gets as clips: a data set as it is, an IMAGE or a VIDEO with its captions as one of one film.

    Raises TrainingError where captions are missing, or given twice.
    """
    if isinstance(clips, Dataset):
        if captions.strip():
            raise TrainingError("The dataset brings its captions, and so captions on this node must be empty.")
        return clips
    film = clip_of(clips)
    return Dataset((film_of_parts(FROM_GRAPH, film, clip_length, captions),))


def collect(clips: Any, captions: str, clip_length: int, dataset: Dataset | None = None) -> Dataset:
    """Clips of the graph behind those of a data set."""
    made = dataset_of(clips, captions, clip_length)
    return join(dataset, made) if dataset else made


@dataclass(frozen=True)
class Shelf:
    """Latents of films of a folder, kept on the disk until a training is finished, so that one that goes on need not
    encode them again. stamp: of what encodes."""

    folder: Path
    stamp: str

    def latents(self, film: Film, encode: Callable[[Clip], Tensor]) -> Tensor:
        """From the disk where the film is the same and the file whole, else encoded. Shapes: -> (frames, c, h, w),
        float32."""
        if not film.mark:
            return encoded(film, encode)
        name = hashlib.sha256(repr((film.name, film.mark, self.stamp)).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.latents"  # the host lists files of this ending nowhere
        if path.is_file():
            try:
                with torch.inference_mode(False):
                    return load_weights(path)["latents"]
            except (TrainingError, KeyError) as error:
                log.warning("%s is encoded again: %s", film.name, error)
        made = encoded(film, encode)
        try:
            save_weights(path, {"latents": made}, {}, torch.float32)
        except OSError as error:
            log.warning("The latents of %s cannot be kept (%s); a run that goes on will encode them again.",
                        film.name, error)  # fmt: skip
        return made


def encoded(film: Film, encode: Callable[[Clip], Tensor]) -> Tensor:
    """The film's latents. Raises TrainingError where they are not all numbers, as nothing can be learned from them."""
    made = encode(film.clip)
    if not made.isfinite().all():
        raise TrainingError(f"The VAE's latents of {film.name} hold NaN or infinite values. If its pictures are "
                            "whole, let the VAE compute in float32: start ComfyUI with --fp32-vae.")  # fmt: skip
    return made


def as_latents(dataset: Dataset, frames: int, stride: int, encode: Callable[[Clip], Tensor],
               shelf: Shelf | None = None, drop: float = 0.1) -> Clips:  # fmt: skip
    """Every film that is long enough, encoded once; of its pictures a chunk is in memory at a time.

    Raises TrainingError before anything is encoded, and VideoError where a file turns out to be damaged.
    """
    latents, captions = [], []
    taken = dataset.usable(frames, stride)
    films = [film for film in dataset.films if any(piece.film is film for piece in taken)]
    bar = comfy.utils.ProgressBar(len(films))
    for film in films:
        whole = shelf.latents(film, encode) if shelf else encoded(film, encode)
        for piece in taken:
            if piece.film is film:
                latents.append(whole[piece.start : piece.start + piece.frames])
                captions.append(piece.caption)
        bar.update(1)
    return Clips(tuple(latents), tuple(captions), frames, stride, drop)


def film_camera(clips: Any, captions: str, *, motion: str, source: str, frames: int, amount: float, clips_each: int,
                width: int, height: int, seed: int) -> tuple[Dataset, StreamedVideo]:  # fmt: skip
    """Translate the widgets of Camera Motion Clips; the clips as a data set and, end to end, as a VIDEO.

    Every picture of an IMAGE is a still of its own. Raises TrainingError and ValueError.
    """
    for name, choice, known in (("motion", motion, MOVES), ("source", source, SOURCES)):
        check_choice(name, choice, known)
    stills = source == STILLS
    work = CameraWork(Move(motion), frames, amount, stills, clips_each, height, width, seed)
    apart = 1 if stills and isinstance(clips, Tensor) else 0
    made = camera_clips(dataset_of(clips, captions, apart), work)
    made.check_sizes("on Camera Motion Clips")
    return made, StreamedVideo(end_to_end(made))
