"""How much memory a run needs, counted from the layers before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .recipe import OPTIMISERS

COPIES = 3  # weight, gradient and the averaged weight, float32 each, beside what the optimiser keeps
# Feature maps of a layer's own size that its backward pass needs while the layer's weights are fixed: inputs of norms
# and activations, queries, keys and values, and three times the four-fold width of a feed-forward.
KEPT = {"residual": 5.0, "transformer": 22.0, "motion": 28.0}
FIRST = 14.0  # those that are still there when the backward pass is at the first attention of a transformer
PASSING = 12.0  # those that only one layer needs at a time, the widest gradients
TABLES = 3  # of one attention, at once in its backward pass: the weights, their gradient and that of the scores


@dataclass(frozen=True)
class Layer:
    """One layer whose inner values are kept: `channels * pixels` numbers per image.

    scores: numbers of its largest attention table per image, more: those of its other ones; none where a fused kernel
    makes none. depth: blocks of this kind in a row.
    """

    kind: str
    channels: int
    pixels: int
    scores: int = 0
    more: int = 0
    depth: int = 1

    @property
    def size(self) -> int:
        return self.channels * self.pixels

    @property
    def block(self) -> float:
        """Numbers that the backward pass of one block needs."""
        return KEPT[self.kind] * self.size + self.scores + self.more

    @property
    def kept(self) -> float:
        return self.depth * self.block

    @property
    def passing(self) -> float:
        """The most that it needs at once, all of its own counted, when it is computed anew for its backward pass."""
        others = (self.depth - 1) * self.block
        return others + max(self.block + PASSING * self.size, FIRST * self.size + TABLES * self.scores)


def run_bytes(trained: int, layers: Iterable[Layer], images: int, item: int, recompute: bool,
              optimiser: str = "AdamW") -> int:  # fmt: skip
    """Bytes of the trained weights with what belongs to them, and of what one backward pass keeps.

    trained: numbers that are trained. images: of one batch. item: bytes of a number of the feature maps.
    recompute: layers keep their input only, and one at a time is computed anew. optimiser: of `OPTIMISERS`.
    """
    layers = list(layers)
    kept = sum(layer.size if recompute else layer.kept for layer in layers)
    own = 0.0 if recompute else 1.0  # what is kept already is not needed once more
    kept += max((layer.passing - own * layer.kept for layer in layers), default=0.0)
    return round(trained * 4 * (COPIES + OPTIMISERS[optimiser]) + kept * images * item)
