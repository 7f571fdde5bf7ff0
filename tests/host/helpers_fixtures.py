"""Fixtures of the tests with motion modules, for `pytest_plugins = ["helpers_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, motion_module
from helpers_restored import Watch, restored
from latentmotion.host.motion import MotionModule


@pytest.fixture(scope="session")
def _session_pair() -> Pair:
    with torch.inference_mode():
        return Pair(tiny_host.sd15(), motion_module(), motion_module(still=True))


@pytest.fixture
def pair(_session_pair: Pair) -> Iterator[Pair]:
    """One model for all tests, each of which must leave it as it found it."""
    yield _session_pair
    _session_pair.assert_restored()


@pytest.fixture
def image(pair: Pair) -> ModelPatcher:
    """The image model of the pair. Files that need models of their own have fixtures of the same name."""
    return pair.plain


@pytest.fixture
def module(pair: Pair) -> MotionModule:
    return pair.module


@pytest.fixture
def fragile_pair(pair: Pair) -> Iterator[Pair]:
    """The same for tests that end in an error: afterwards the image model draws what it drew, too."""
    yield pair
    pair.assert_untouched()


@pytest.fixture
def watched() -> Iterator[Watch]:
    """`watched(model)` gives back the model, which must be at the end of the test what it is now, bit for bit."""

    def watch(model: ModelPatcher | MotionModule) -> ModelPatcher | MotionModule:
        stack.enter_context(restored(model))
        return model

    with ExitStack() as stack:
        yield watch
