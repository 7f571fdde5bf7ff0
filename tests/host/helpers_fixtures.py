"""Fixtures of the tests with motion modules, for `pytest_plugins = ["helpers_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.model_management
import pytest
import tiny_host
import torch
from helpers_motion import Pair, motion_module


@pytest.fixture(scope="session")
def _session_pair() -> Pair:
    with torch.inference_mode():
        return Pair(tiny_host.sd15(), motion_module(), motion_module(still=True))


@pytest.fixture
def pair(_session_pair: Pair) -> Iterator[Pair]:
    """One model for all tests, each of which must leave it as it found it."""
    yield _session_pair
    _session_pair.assert_nothing_left()
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(_session_pair.plain, _session_pair.weights)


@pytest.fixture
def fragile_pair(pair: Pair) -> Iterator[Pair]:
    """The same for tests that end in an error: afterwards the image model draws what it drew, too."""
    yield pair
    pair.assert_untouched()
