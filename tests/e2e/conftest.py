"""Tests against a real server: ComfyUI in a process of its own with the pack linked in, booted once for the session.

    python3 scripts/run.py test tests/e2e

`$COMFYUI_PATH` names the host; the server runs on the Python that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_clips import provide_clips
from host_server import HostServer

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The ComfyUI under test."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.fail("tests/e2e needs a ComfyUI: set COMFYUI_PATH, or run `python3 scripts/run.py test`")
    return Path(path)


@pytest.fixture(scope="session")
def server(host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A running server: `server.url`, `server.base` (its models/, input/, output/), `server.run(api_prompt)`."""
    base = tmp_path_factory.mktemp("server")
    provide_clips(base)
    with HostServer(Path(sys.executable), host_path, base, ["--preview-method", "latent2rgb"]) as running:
        yield running


@pytest.fixture(scope="session")
def test_results() -> Path:
    """Where screenshots and other things to look at are left, beside the reports."""
    folder = ROOT / "test-results"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's Chromium ($CHROMIUM, or on the path); without one the test is skipped."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or set $CHROMIUM)")
    return found
