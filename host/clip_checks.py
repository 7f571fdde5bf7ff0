"""Whether a sampling run can be what its nodes say: looked at when it begins, and again in every call of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..motion_modules.errors import ClipError
from . import memory
from .schedule import is_schedule

log = logging.getLogger(__name__)


def window_length(model_options: dict, frames: int) -> int:
    """Frames of the windows that a batch of so many frames is sampled in; 0 where it is sampled at once."""
    handler = model_options.get("context_handler")
    length = getattr(handler, "context_length", 0)
    return length if getattr(handler, "dim", 0) == 0 and frames > length else 0


def check_one_clip(model_options: dict, frames: int, length: int) -> None:
    """Raise ClipError where windows would run over a batch of so many frames that holds clips of `length`."""
    if length not in (0, frames) and window_length(model_options, frames):
        raise ClipError(f"frames is {length} on Apply Motion Module, ST-Attention or Load Tuned Video Model, so that "
                        f"{frames} frames are several clips, and context windows run over all of them. Set frames to 0 "
                        "if they are one clip; make several long clips one after the other.")


def agreed(counts: Iterable[int]) -> int:
    """Frames per clip, which modules on one MODEL must agree on: they share the norms that see whole clips."""
    known = sorted(set(counts))
    if len(known) > 1:
        raise ClipError(f"The motion modules on this MODEL are set to clips of {' and '.join(map(str, known))} "
                        "frames. Set frames to the same number on every Apply Motion Module.")
    return known[0]


def check_frames(frames: int, images: int, motion: Any, windowed: bool, extra: int = 0) -> None:
    """Raise ClipError unless a batch of `images` is whole clips of `frames` that this inflate.Motion knows.

    windowed: they are windows of a longer clip. extra: frames that the host put before a window.
    """
    spec, name = motion.module.spec, motion.module.name
    if images == 0:
        raise ClipError("The latent holds no frames. Set batch_size of the Empty Latent Image node to the number of "
                        "frames, 16 for instance.")
    if images % frames:
        raise ClipError(f"The batch holds {images} images, which {frames} frames per clip do not divide. Set frames on "
                        f"Apply Motion Module to 0 for one clip of {images} frames, or change the batch.")
    if frames == 1 and not windowed:
        wrong = ("the latent holds one frame only. Set batch_size of the Empty Latent Image node to the number of "
                 "frames, 16 for instance") if images == 1 else (
                 f"frames is 1 on Apply Motion Module. Set it to 0 for one clip of {images} frames")  # fmt: skip
        raise ClipError(f"This MODEL makes video, and {wrong}.")
    if frames - extra > spec.positions and not motion.settings.stretch:
        several = frames != images
        cure = "" if several else f"put Sliding Context on the MODEL with a length of at most {spec.positions}, "
        raise ClipError(f"{name} knows {spec.positions} frame positions, and this {'window' if windowed else 'clip'} "
                        f"has {frames - extra} frames. Make it shorter, {cure}or set positions on Apply Motion Module "
                        "to 'stretch'.")


@dataclass(frozen=True, eq=False)
class ClipChecks:
    """Wraps a sampling run of the host. motions: those of inflate.Inflation."""

    motions: Sequence[Any]

    def __deepcopy__(self, memo: dict) -> ClipChecks:
        """Immutable, so copies of a run's options share it."""
        return self

    def sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        """OUTER_SAMPLE: refuse what would fail on the way, and say what will go on otherwise than asked."""
        guider, images = executor.class_obj, noise.shape[0]
        window = window_length(guider.model_options, images)
        acting = [motion for motion in self.motions if not motion.settings.strength.is_zero]
        for motion in acting:
            frames = window or motion.settings.frames or images
            check_frames(frames, frames if window else images, motion, bool(window))
        if acting and not window:
            agreed(motion.settings.frames or images for motion in acting)
        run = memory.run_of(guider.model_options.get("transformer_options", {}))
        run.notes = list(self._surprises(guider.model_patcher, acting, sigmas))
        for line in run.notes:
            log.warning(line)
        return executor(noise, latent_image, sampler, sigmas, *args, **kw)

    def _surprises(self, model: ModelPatcher, acting: Sequence[Any], sigmas: Tensor) -> Iterable[str]:
        """Sentences about settings that this run does not follow."""
        sampling = model.get_model_object("model_sampling")
        wanted = next((m.settings.schedule for m in reversed(self.motions) if m.settings.schedule is not None), None)
        if wanted is not None and not is_schedule(sampling, wanted):
            yield (f"The noise schedule is not '{wanted.value}' as Apply Motion Module set it: a node behind it, such "
                   "as ModelSamplingDiscrete, replaced it. Put that node before Apply Motion Module.")
        for motion in acting:
            if not any(motion.settings.acts_at(float(sigma), sampling) for sigma in sigmas[:-1]):
                yield (f"{motion.module.name} does nothing in this run: it acts from {motion.settings.start:g} to "
                       f"{motion.settings.end:g} of the noise schedule, where none of the steps is.")
