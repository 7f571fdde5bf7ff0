"""Agreement of frames and text against the two sums written out over all pairs."""

from __future__ import annotations

from itertools import combinations
from math import isnan

import pytest
import torch
from latentmotion.sampling.agreement import Agreement


@pytest.mark.parametrize("pieces", [[7], [3, 4], [1] * 7])
def test_all_pairs_are_counted_however_the_frames_come(pieces: list[int]) -> None:
    vectors = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    text = torch.randn(12, generator=torch.Generator().manual_seed(1))
    agreement = Agreement(text)
    for part in vectors.split(pieces):
        agreement.add(part)
    cosine = torch.nn.functional.cosine_similarity
    pairs = [float(cosine(a, b, dim=0)) for a, b in combinations(vectors.double(), 2)]
    assert agreement.consistency == pytest.approx(100 * sum(pairs) / len(pairs), abs=1e-9)
    assert agreement.faithfulness == pytest.approx(100 * float(cosine(vectors, text[None]).mean()), abs=1e-4)


def test_ends_of_the_scale() -> None:
    same, opposite = Agreement(torch.ones(3)), Agreement(torch.ones(3))
    same.add(torch.ones(5, 3, dtype=torch.float16) * 7)
    opposite.add(torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]]))
    assert same.consistency == pytest.approx(100) and same.faithfulness == pytest.approx(100)
    assert opposite.consistency == pytest.approx(-100) and opposite.faithfulness == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_measured_is_not_a_number() -> None:
    one = Agreement()
    assert isnan(one.consistency) and isnan(Agreement(torch.ones(2)).faithfulness)
    one.add(torch.ones(1, 3))
    assert isnan(one.consistency) and isnan(one.faithfulness)
