"""Softmax attention for training on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def attention(function: Callable | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
              mask: torch.Tensor | None = None, **_: object) -> torch.Tensor:  # fmt: skip
    """Shapes: q (n, length, c), k and v (n, other, c), mask broadcastable to (n heads, length, other) -> as q.

    Has the signature of the host's attention override; `function`, what would have been called, is left alone.
    On a CPU the products are spelled out, because torch's fused kernel is several times slower backwards there.
    """
    n, length, channels = q.shape
    width = channels // heads
    q, k, v = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v))
    if q.device.type != "cpu":
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        q, k, v = (t.reshape(n * heads, -1, width) for t in (q, k, v))
        scores = torch.bmm(q * width**-0.5, k.transpose(1, 2))
        weights = (scores if mask is None else scores + mask).softmax(-1)
        out = torch.bmm(weights, v).unflatten(0, (n, heads))
    return out.transpose(1, 2).reshape(n, length, channels)


def over_frames(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same over the few frames of a clip, for motion modules. Shapes: q, k, v (n, heads, f, d) -> the same."""
    if q.device.type != "cpu":
        return functional.scaled_dot_product_attention(q, k, v)
    return torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1), v)
