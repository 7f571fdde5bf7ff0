"""Starting noise of long clips."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class NoiseKind(str, Enum):
    """Noise of the frames behind the first window."""

    INDEPENDENT = "independent"
    SHUFFLED = "FreeNoise shuffle"
    REPEATED = "repeated"


def mark_whole(noise: Tensor) -> Tensor:
    """Mark noise that was found frame by frame for a whole clip, and is nobody's to arrange. Returns the tensor."""
    noise.latentmotion_whole = True
    return noise


def is_whole(noise: Tensor) -> bool:
    return getattr(noise, "latentmotion_whole", False)


def standardise(noise: Tensor, share: float = 1.0) -> Tensor:
    """Bring each channel of each frame to mean 0 and deviation 1, as fresh noise has them, or a share of the way.

    Means are multiplied by 1 - share, deviations raised to that power. Shapes: (..., h, w) -> the same.
    Noise that was found by inversion in few steps is weaker than fresh noise, and its means hold the clip's colours, so
    that a sampler keeps them whatever the prompt says.
    """
    mean = noise.mean((-2, -1), keepdim=True)
    middle = noise - mean
    deviation = middle.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=torch.finfo(noise.dtype).tiny)
    return middle / deviation**share + (1.0 - share) * mean


def arrange_noise(noise: Tensor, kind: NoiseKind, length: int, overlap: int, axis: int, seed: int) -> Tensor:
    """Make later frames reuse the noise of the first window, so that windows agree more.

    Shapes: noise has its frames on `axis`; the result has the same shape and shares no memory with it. Noise that is
    marked as whole stays as it is.
    Source of the shuffle: Qiu et al., FreeNoise, arXiv 2310.15169, section 3.2: each further piece of
    `length - overlap` frames is a random permutation of the piece one window earlier.
    """
    frames, hop, whole = noise.shape[axis], length - overlap, is_whole(noise)
    noise = noise.clone()
    if kind is NoiseKind.INDEPENDENT or frames <= length or whole:
        return noise
    generator = torch.Generator().manual_seed(seed)
    for start in range(length, frames, hop):
        source = torch.arange(start - length, start - length + hop)
        if kind is NoiseKind.SHUFFLED:
            source = source[torch.randperm(hop, generator=generator)]
        count = min(hop, frames - start)
        piece = noise.index_select(axis, source[:count].to(noise.device))
        noise.narrow(axis, start, count).copy_(piece)
    return noise
