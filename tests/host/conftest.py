"""Tests inside a real ComfyUI: the host named by `$COMFYUI_PATH`, in process, and the pack as `latentmotion`.

The builders of small random models are in `tiny_host.py`, which a test imports as `import tiny_host`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pack
import pytest


def only_hands_out(config: pytest.Config) -> bool:
    """Whether this process runs no test itself, as its workers do (pytest -n)."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """Load the host once, before any test module of this folder is imported."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        raise pytest.UsageError("tests/host needs a ComfyUI: set COMFYUI_PATH, or run `python3 scripts/run.py test`")
    if only_hands_out(config):
        return
    # Small tensors on a busy machine: two threads that wait for each other were measured ten times slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = tempfile.mkdtemp(prefix="latentmotion-host-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in ("custom_nodes", "input", "models", "output", "temp", "user"):
        Path(base, folder).mkdir()
    pack.load_host(Path(path), "--cpu", "--base-directory", base)
    pack.load_pack()


def pytest_report_header(config: pytest.Config) -> str:
    if only_hands_out(config):
        return f"host: {os.environ['COMFYUI_PATH']}"
    from comfyui_version import __version__

    return f"host: ComfyUI {__version__} in {os.environ['COMFYUI_PATH']}"


@pytest.fixture(scope="session")
def base_directory() -> Path:
    """The host's base directory: models/, input/, output/, temp/ are under it and empty at the start."""
    import folder_paths

    return Path(folder_paths.base_path)


@pytest.fixture(autouse=True)
def as_the_executor_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test as the host runs a node: in inference mode, with nothing loaded and no cancel pending."""
    import comfy.model_management
    import torch

    comfy.model_management.interrupt_current_processing(False)
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()


@pytest.fixture(autouse=True)
def host_globals_unchanged() -> Iterator[None]:
    """Fail any test after which a function or class attribute of the host or of torch.nn is another object."""
    import tiny_host

    before = tiny_host.global_functions()
    yield
    changed = tiny_host.changed_functions(before, tiny_host.global_functions())
    assert not changed, f"globals of the host were replaced: {', '.join(changed[:10])}"


@pytest.fixture(scope="session")
def core_nodes() -> dict[str, type]:
    """Every core node of the host with its extras, by node id (the host's own table)."""
    import tiny_host

    return tiny_host.register_core_nodes()


@pytest.fixture(scope="session")
def pack_nodes(core_nodes: dict[str, type]) -> dict[str, type]:
    """The pack's nodes by node id, registered in the host's table as well."""
    import tiny_host

    return tiny_host.register_pack_nodes(core_nodes)


@pytest.fixture
def run_node(request: pytest.FixtureRequest, core_nodes: dict[str, type]) -> Callable[..., tuple]:
    """`run_node("KSampler", model=..., ...)`: one node called as the executor calls it; its outputs as a tuple."""
    import tiny_host

    def run(node_id: str, **inputs: object) -> tuple:
        if node_id not in core_nodes:
            request.getfixturevalue("pack_nodes")
        return tiny_host.call_node(core_nodes[node_id], **inputs)

    return run


@pytest.fixture
def run_graph(request: pytest.FixtureRequest, core_nodes: dict[str, type]) -> Callable[..., dict]:
    """`run_graph(api_prompt)`: a graph through the host's own validation and PromptExecutor (see tiny_host.Graphs).

    One executor for the test, so that its cache behaves between runs as on a server.
    """
    import tiny_host

    graphs = tiny_host.Graphs()

    def run(prompt: dict[str, dict], on_message: Callable[[str, object], None] | None = None) -> dict:
        if any(node["class_type"] not in core_nodes for node in prompt.values()):
            request.getfixturevalue("pack_nodes")
        return graphs.run(prompt, on_message)

    return run
