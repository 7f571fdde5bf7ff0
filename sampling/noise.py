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


def arrange_noise(noise: Tensor, kind: NoiseKind, length: int, overlap: int, axis: int, seed: int) -> Tensor:
    """Make later frames reuse the noise of the first window, so that windows agree more.

    Shapes: noise has its frames on `axis`; the result has the same shape and shares no memory with it.
    Source of the shuffle: Qiu et al., FreeNoise, arXiv 2310.15169, section 3.2: each further piece of
    `length - overlap` frames is a random permutation of the piece one window earlier.
    """
    noise = noise.clone()
    frames, hop = noise.shape[axis], length - overlap
    if kind is NoiseKind.INDEPENDENT or frames <= length:
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
