"""How much memory a run needs, counted from the layers before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COPIES = 5  # weight, gradient, two moments of AdamW and the averaged weight, float32 each
# Feature maps of a layer's own size that its backward pass needs while the layer's weights are fixed.
KEPT = {"residual": 5.0, "transformer": 30.0, "motion": 40.0}


@dataclass(frozen=True)
class Layer:
    """One layer whose inner values are kept: `channels * pixels` numbers per image.

    scores: numbers of its attention tables per image.
    """

    kind: str
    channels: int
    pixels: int
    scores: int = 0

    @property
    def size(self) -> int:
        return self.channels * self.pixels

    @property
    def kept(self) -> float:
        return KEPT[self.kind] * self.size + 2 * self.scores


def run_bytes(trained: int, layers: Iterable[Layer], images: int, item: int, recompute: bool) -> int:
    """Bytes of the trained weights with what belongs to them, and of what one backward pass keeps.

    trained: numbers that are trained. images: of one batch. item: bytes of a number of the feature maps.
    recompute: layers keep their input only, and one at a time is computed anew.
    """
    layers = list(layers)
    if recompute:
        kept = sum(layer.size for layer in layers) + max((layer.kept for layer in layers), default=0.0)
    else:
        kept = sum(layer.kept for layer in layers)
    return round(trained * 4 * COPIES + kept * images * item)
