"""Clips of any length through a temporal decoder: exactly, layer by layer, or streaming with statistics fixed once.

The norms of these decoders take their statistics over all frames, so no frame is final before the last one was seen.
"exact" lets the whole clip arrive before each norm; "streaming" looks at some frames first and then passes all of them
through in one go. Neither result depends on how many frames are worked on at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..norm import plain_affine
from .flow import Fetch, Flow, Piece, branch, convolve, merge, normalise, spatial
from .plan import Plan, Spatial, Statistics, for_clip, measure, norms_of, pool

EXACT, STREAMING = "exact", "streaming"  # names of the two ways
SURVEY_FRAMES = 16
Gate = Callable[[Flow, nn.GroupNorm, bool], Flow]


@dataclass(frozen=True)
class Workshop:
    """How to work: nothing in it changes the result.

    chunk: frames worked on at once. park: puts a piece of frames away, to wait for the rest of the clip, and returns
    it from where it lies now; called in the order in which they are needed again. fetch: weight and bias of a layer
    for a given input. on_frames: told how many frames have passed one of the `work_units` stations.
    """

    chunk: int = 4
    park: Callable[[Tensor], Tensor] = lambda frames: frames
    fetch: Fetch = plain_affine
    on_frames: Callable[[int], None] = lambda count: None


def exact(plan: Plan, latent: Tensor, shop: Workshop) -> Iterator[Tensor]:
    """Decode one clip as one call of the decoder on all its frames would.

    Shapes: latent (f, c, h, w) -> pieces (n, 3, H, W) in order. The memory of `chunk` frames, and two parked feature
    maps per frame.
    """
    return _run(plan, latent, _Sweep(shop), shop)


def streaming(plan: Plan, latent: Tensor, shop: Workshop) -> Iterator[Tensor]:
    """Decode one clip in the memory of `chunk` frames, whatever its length.

    The statistics of the norms are those of an exact decode of `surveyed` frames. A clip that is no longer than that
    is decoded exactly. Shapes as in `exact`.
    """
    if len(latent) <= SURVEY_FRAMES:
        return exact(plan, latent, shop)
    known = survey(plan, latent, shop)
    return _run(plan, latent, lambda flow, norm, begins: _known(flow, norm, begins, known[norm], shop), shop)


def survey(plan: Plan, latent: Tensor, shop: Workshop) -> dict[nn.GroupNorm, Statistics]:
    """Statistics of every norm in an exact decode of some frames of a clip."""
    sweep = _Sweep(shop)
    for _ in _run(plan, surveyed(latent), sweep, shop):
        pass
    return sweep.found


def surveyed(latent: Tensor) -> Tensor:
    """The frames whose statistics stand for those of the clip: first, last, and the others evenly between them.

    Measured against as many neighbouring frames, these come twice as close to the statistics of the clip.
    """
    last = len(latent) - 1
    return latent[[round(number * last / (SURVEY_FRAMES - 1)) for number in range(SURVEY_FRAMES)]]


def work_units(plan: Plan, frames: int, streams: bool) -> int:
    """How many frames `on_frames` will have been told of at the end."""
    stations = 1 + sum(1 for _ in norms_of(for_clip(plan, frames)))
    if not streams or frames <= SURVEY_FRAMES:
        return frames * stations
    return SURVEY_FRAMES * stations + frames


def _run(plan: Plan, latent: Tensor, gate: Gate, shop: Workshop) -> Iterator[Tensor]:
    flow: Flow = (Piece(part) for part in latent.split(shop.chunk))
    for step in for_clip(plan, len(latent)):
        if isinstance(step, Spatial):
            flow = spatial(flow, step.layer)
            continue
        begins = step.weight is not None
        for stage in step.stages:
            if stage.norm is not None:
                flow = gate(flow, stage.norm, begins)
                begins = False
            flow = convolve(flow, stage.conv, shop.fetch, isinstance(gate, _Sweep))
        if step.weight is not None:
            flow = merge(flow, step.weight)
    for piece in flow:
        shop.on_frames(len(piece.x))
        yield piece.x


def _known(flow: Flow, norm: nn.GroupNorm, begins: bool, statistics: Statistics, shop: Workshop) -> Flow:
    return normalise(branch(flow) if begins else flow, norm, statistics, shop.fetch)


@dataclass
class _Sweep:
    """A gate that lets nothing through before the whole clip is there; keeps the statistics it found."""

    shop: Workshop
    found: dict[nn.GroupNorm, Statistics] = field(default_factory=dict)

    def __call__(self, flow: Flow, norm: nn.GroupNorm, begins: bool) -> Flow:
        frames: deque[Tensor] = deque()
        skips: deque[Tensor] = deque()
        measured = []
        for piece in flow:
            device = piece.x.device
            measured.append(measure(piece.x, norm.num_groups))
            frames.extend(self.shop.park(piece.x))
            skips.extend(piece.skip)
            self.shop.on_frames(len(piece.x))
            del piece
        self.found[norm] = pool(measured)

        def unpark(count: int) -> Piece:
            taken = tuple(frames.popleft() for _ in range(count))
            skip = taken if begins else tuple(skips.popleft() for _ in range(min(count, len(skips))))
            x = torch.empty((count, *taken[0].shape), dtype=taken[0].dtype, device=device)
            for place, frame in zip(x, taken, strict=True):
                place.copy_(frame)
            return Piece(x, skip)

        back = map(unpark, sizes(len(frames), self.shop.chunk))
        return normalise(back, norm, self.found[norm], self.shop.fetch)


def sizes(frames: int, chunk: int) -> list[int]:
    """Lengths of the pieces of a clip."""
    return [min(chunk, frames - start) for start in range(0, frames, chunk)]
