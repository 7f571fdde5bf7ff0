"""Tiles cover a frame, and blending tiles of a picture gives the picture."""

from __future__ import annotations

import pytest
import torch
from latentmotion.sampling.tiles import feather, tiles


@pytest.mark.parametrize(("height", "width", "size", "overlap"), [(5, 5, 8, 2), (9, 20, 8, 2), (8, 65, 64, 16),
                                                                 (33, 17, 8, 4)])  # fmt: skip
@pytest.mark.parametrize("scale", [1, 3])
def test_blended_tiles_are_the_picture(height: int, width: int, size: int, overlap: int, scale: int) -> None:
    picture = torch.randn(2, height * scale, width * scale, generator=torch.Generator().manual_seed(0))
    canvas, total = torch.zeros_like(picture), torch.zeros(picture.shape[1:])
    for tile in tiles(height, width, size, overlap):
        assert 0 < tile.bottom - tile.top <= size and 0 < tile.right - tile.left <= size
        weight = feather(tile, height, width, overlap, scale)
        assert weight.min() > 0
        tile.of(canvas, scale).add_(tile.of(picture, scale) * weight)
        tile.of(total, scale).add_(weight)
    torch.testing.assert_close(canvas / total, picture)


def test_weights_fade_over_the_overlap() -> None:
    """From one tile to the next the share changes by the same small step, and no tile ends abruptly."""
    left, right = tiles(4, 12, 8, 4)
    shares = torch.zeros(2, 12 * 8)
    for share, tile in zip(shares, (left, right), strict=True):
        share[tile.left * 8 : tile.right * 8] = feather(tile, 4, 12, 4, 8)[0]
    shares /= shares.sum(0)
    assert (shares[:, 1:] - shares[:, :-1]).abs().max() <= 1 / 32 + 1e-6


def test_a_frame_of_one_tile_is_not_cut() -> None:
    (tile,) = tiles(8, 6, 8, 2)
    assert (tile.top, tile.bottom, tile.left, tile.right) == (0, 8, 0, 6)
    assert torch.equal(feather(tile, 8, 6, 2, 1), torch.ones(8, 6))
