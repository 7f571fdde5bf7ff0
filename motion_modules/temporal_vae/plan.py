"""A temporal decoder written down as a line of layers, so that a clip can be passed through it in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spatial:
    """Layers that treat every frame alone: (n, c, h, w) -> (n, c', h', w').

    channels: c'. scale: h' / h = w' / w. held: from h' w' to the most elements of a frame that are alive while the
    layers run, those that come in and go out included.
    """

    layer: Callable[[Tensor], Tensor]
    channels: int
    held: Callable[[int], int]
    scale: int = 1


@dataclass(frozen=True)
class Stage:
    """GroupNorm over the whole clip and SiLU (both left out where `norm` is None), then a (3, 1, 1) convolution."""

    norm: nn.GroupNorm | None
    conv: nn.Conv3d


@dataclass(frozen=True)
class Temporal:
    """Stages over the frames of a clip: x -> x + weight * stages(x), or stages(x) alone where `weight` is None.

    weight: a function from x to its factor, asked anew for every piece, as a host may move the parameter. Where there
    is one, the first stage has a norm. on_single: whether a clip of one frame goes through it as well.
    """

    stages: tuple[Stage, ...]
    weight: Callable[[Tensor], Tensor | float] | None = None
    on_single: bool = True


Plan = tuple[Spatial | Temporal, ...]


def for_clip(plan: Plan, frames: int) -> Plan:
    """What a clip of so many frames goes through."""
    return tuple(step for step in plan if frames > 1 or isinstance(step, Spatial) or step.on_single)


def norms_of(plan: Plan) -> Iterator[nn.GroupNorm]:
    """Every norm over the whole clip, in the order in which the clip meets them."""
    for step in plan:
        if isinstance(step, Temporal):
            yield from (stage.norm for stage in step.stages if stage.norm is not None)


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of the groups of a norm over all frames of a clip: (groups,) each, float32 or wider."""

    mean: Tensor
    variance: Tensor


def measure(x: Tensor, groups: int) -> Tensor:
    """Mean and variance of each group in each frame, in float32 at least.

    Shapes: x (n, c, h, w) -> (n, 2, groups). Frame by frame, so that a wider copy exists of one frame only, and the
    figures of a frame do not depend on its neighbours in the piece.
    """
    found = []
    for frame in x:
        wide = frame.float() if frame.element_size() < 4 else frame
        variance, mean = torch.var_mean(wide.reshape(groups, -1), dim=1, correction=0)
        found.append(torch.stack((mean, variance)))
    return torch.stack(found)


def pool(measured: list[Tensor]) -> Statistics:
    """Statistics of a clip from those of its frames, which are all of the same size.

    Shapes: measured[i] (n_i, 2, groups). Variance of the whole = mean of the variances + variance of the means, in
    float64, so that large means cost no digits; the result does not depend on how the frames were grouped.
    """
    frames = torch.cat([part.to("cpu", torch.float64) for part in measured])
    mean, variance = frames.mean(0)
    spread = (frames[:, 0] - mean).square().mean(0)
    kind = measured[0].dtype
    return Statistics(mean.to(kind), (variance + spread).to(kind))
