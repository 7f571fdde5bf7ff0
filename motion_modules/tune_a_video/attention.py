"""Self-attention of an image model whose keys and values come from other frames of the clip.

Source: Wu et al., arXiv 2212.11565, section 3.2 (ST-Attn) and the alternatives discussed there.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Softmax attention: q (b, n, c), k and v (b, m, c) -> (b, n, c)."""


class Reach(str, Enum):
    """The frames whose keys and values a frame sees. Pairs of tokens, for m frames of N tokens, behind each."""

    SPARSE = "first and previous"  # 2 m N^2; the first frame sees itself twice, the others not themselves
    OWN = "per frame"  # m N^2
    CAUSAL = "causal"  # m (m + 1) / 2 N^2
    FULL = "full"  # m^2 N^2


def attend(reach: Reach, frames: int, images: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
    """Self-attention over the frames that `reach` names, from queries, keys and values of every frame.

    frames: per clip. images: in the batch, clip after clip; a picture may come in several tiles, one after another.
    Keys are taken after their projection, so that each frame is projected once.

    Shapes: q (v f t, n, c), k and v (v f t, m, c) with `images = v f` -> (v f t, n, c).
    """
    if reach is Reach.OWN or frames == 1:
        return attention(q, k, v)
    tiles = q.shape[0] // images
    if reach is Reach.SPARSE:
        return attention(q, _first_and_previous(k, frames, tiles), _first_and_previous(v, frames, tiles))
    # v t f n c: whole clips of one tile each
    q, k, v = (x.unflatten(0, (-1, frames, tiles)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    if reach is Reach.FULL:
        out = attention(*(x.flatten(1, 2) for x in (q, k, v))).unflatten(1, (frames, -1))
    else:
        seen = [(k[:, : i + 1].flatten(1, 2), v[:, : i + 1].flatten(1, 2)) for i in range(frames)]
        out = torch.stack([attention(q[:, i], *seen[i]) for i in range(frames)], dim=1)
    return out.unflatten(0, (-1, tiles)).transpose(1, 2).flatten(0, 2)


def _first_and_previous(x: Tensor, frames: int, tiles: int) -> Tensor:
    """Shapes: (v f t, m, c) -> (v f t, 2 m, c)."""
    clips = x.unflatten(0, (-1, frames, tiles))
    first = clips[:, :1]
    previous = torch.cat((first, clips[:, :-1]), dim=1)
    return torch.cat((first.expand_as(previous), previous), dim=-2).flatten(0, 2)
