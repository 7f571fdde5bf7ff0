"""How much the frames of a clip agree with each other and with a text, from one embedding per frame.

Source: Tune-A-Video (Wu et al., arXiv 2212.11565), section 5.2: frame consistency is the mean cosine over all pairs of
frames, textual faithfulness the mean cosine of frames and prompt.
"""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor


class Agreement:
    """Cosines x 100, in the memory of one embedding: of unit vectors u the pairs sum to (|sum u|^2 - n) / 2.

    text: embedding of the prompt (width,), None for clips without.
    """

    def __init__(self, text: Tensor | None = None) -> None:
        self.text = None if text is None else _unit(text)
        self.frames = 0
        self._sum: Tensor | None = None

    def add(self, embeddings: Tensor) -> None:
        """Count further frames. Shapes: embeddings (n, width)."""
        total = _unit(embeddings).sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self.frames += len(embeddings)

    @property
    def consistency(self) -> float:
        """Mean over all pairs of frames, -100 to 100; NaN for less than two frames."""
        n = self.frames
        return nan if n < 2 else 100 * (float(self._sum.square().sum()) - n) / (n * (n - 1))

    @property
    def faithfulness(self) -> float:
        """Mean of frames with the text, -100 to 100; NaN without frames or text."""
        return nan if self.text is None or not self.frames else 100 * float(self._sum @ self.text) / self.frames


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.detach().cpu().double(), dim=-1)
