"""Fixtures of the training tests, for `pytest_plugins = ["helpers_train_fixtures"]`."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_host
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL
from latentmotion.host import paths


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for every folder of models."""
    monkeypatch.setattr(paths.folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    monkeypatch.setattr(paths.folder_paths, "get_full_path", lambda _, name: str(tmp_path / name))
    return tmp_path


@pytest.fixture
def model() -> ModelPatcher:
    return tiny_host.sd15(**SMALL)
