"""Memory of decoding from shapes alone: what the layers of a decoder and the frames that wait hold at once."""

from __future__ import annotations

from dataclasses import dataclass

from . import decode
from .plan import Plan, Spatial, for_clip

TAPS = 2  # frames that a convolution over time keeps for the next piece


@dataclass(frozen=True)
class Footprint:
    """Most elements alive at once, weights and latents left out.

    working: of the frames that are worked on, and what a stream keeps to go on. peak: parked frames included.
    """

    working: int
    peak: int


@dataclass
class _Place:
    """Where a walk through the layers is: channels and pixels of the feature map."""

    channels: int
    pixels: int

    @property
    def frame(self) -> int:
        return self.channels * self.pixels

    def enter(self, step: Spatial) -> int:
        """Go on behind these layers; elements of a frame while they run."""
        self.channels, self.pixels = step.channels, self.pixels * step.scale**2
        return step.held(self.pixels)


def footprint(plan: Plan, shape: tuple[int, int, int, int], chunk: int, streams: bool) -> Footprint:
    """Walk the layers as `exact` or `streaming` would. shape: frames, channels, height and width of a clip's latents.

    A stream is taken as one so long that all layers work at once; a short one needs less.
    """
    frames, surveyed = shape[0], decode.SURVEY_FRAMES
    if not streams or frames <= surveyed:
        return _exact(plan, shape, min(chunk, frames))
    survey = _exact(plan, (surveyed, *shape[1:]), min(chunk, surveyed))
    stream = _stream(plan, shape, min(chunk, frames))
    return Footprint(max(survey.working, stream), max(survey.peak, stream))


def _stream(plan: Plan, shape: tuple[int, int, int, int], n: int) -> int:
    """All convolutions over time keep their frames, and what is to be added to one of them, while one layer runs."""
    place, kept, most = _Place(shape[1], shape[2] * shape[3]), 0, 0
    for step in for_clip(plan, shape[0]):
        if isinstance(step, Spatial):
            most = max(most, n * place.enter(step))
            continue
        adds = step.weight is not None
        kept += (TAPS + adds) * len(step.stages) * place.frame
        # To be added, input, input with the frames kept, output.
        most = max(most, ((3 + adds) * n + TAPS) * place.frame)
    return kept + most


def _exact(plan: Plan, shape: tuple[int, int, int, int], n: int) -> Footprint:
    """From one norm to the next, parked frames in front of these layers go and those behind them come.

    To be added later are frames that are parked already.
    """
    place, frames = _Place(shape[1], shape[2] * shape[3]), shape[0]
    working = peak = stays = goes = work = taps = 0
    for step in for_clip(plan, frames):
        if isinstance(step, Spatial):
            work = max(work, taps + n * place.enter(step))
            continue
        for number, stage in enumerate(step.stages):
            if stage.norm is not None:
                peak = max(peak, stays * frames + max(goes, place.frame) * (frames - n) + work)
                waits, is_last = (1 if number == 0 else 2) * place.frame, number == len(step.stages) - 1
                stays, goes = (0, waits) if is_last else (place.frame, waits - place.frame)
                work = taps = 0
            work = max(work, taps + (3 * n + 2 * TAPS) * place.frame)
            taps += TAPS * place.frame
            working = max(working, work)
        working = max(working, work)
    return Footprint(max(working, work), max(peak, stays * frames + goes * (frames - n) + work))
