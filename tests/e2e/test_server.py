"""The pack on a running server: it loads cleanly, describes itself, and bad graphs leave the server healthy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from console import SetupError
from host_server import PACK_NAME, HostServer, ask, free_port

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


def plain_graph(width: int = 64, color: int = 255) -> dict[str, Any]:
    """A graph of core nodes only: a coloured clip, saved as a video."""
    image = {"width": width, "height": width, "batch_size": 4, "color": color}
    save = {"video": ["2", 0], "filename_prefix": "plain", "format": "mp4", "codec": "h264"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 8.0}},
        "3": {"class_type": "SaveVideo", "inputs": save},
    }


def assert_healthy(server: HostServer, color: int) -> None:
    """The server answers, its queue is empty and it still makes files (a new colour each time defeats the cache)."""
    queue = server.get("/queue")
    assert queue["queue_running"] == [] and queue["queue_pending"] == []
    entry = server.run(plain_graph(color=color))
    assert entry["status"]["status_str"] == "success" and entry["outputs"]["3"]["images"]


@pytest.fixture(scope="module")
def own_nodes(server: HostServer) -> dict[str, Any]:
    """What /object_info says about the pack's nodes."""
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("LatentMotion")}


def test_pack_loads_without_a_complaint(server: HostServer) -> None:
    """What other tests ran on the server comes after its first prompt."""
    log = "\n".join(server.log_lines()).split("got prompt")[0]
    assert PACK_NAME in log and "IMPORT FAILED" not in log and "Traceback" not in log, log


def test_nodes_describe_themselves(own_nodes: dict[str, Any]) -> None:
    assert len(own_nodes) >= 4
    for name, node in own_nodes.items():
        assert node["display_name"] and node["description"], name
        assert node["category"].startswith("latent motion/"), name
        assert node["python_module"] == f"custom_nodes.{PACK_NAME}", name
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        silent = [key for key, spec in inputs.items() if len(spec) < 2 or not spec[1].get("tooltip")]
        assert not silent, f"{name}: no tooltip for {silent}"
        assert all(node["output_tooltips"]), f"{name}: an output has no tooltip"


def test_nodes_have_help_pages(server: HostServer, own_nodes: dict[str, Any]) -> None:
    for name in own_nodes:
        with ask(f"{server.url}/extensions/{PACK_NAME}/docs/{name}.md") as page:
            assert len(page.read()) > 200, f"the help page of {name} says nothing"


def test_an_unknown_node_is_refused(server: HostServer) -> None:
    with pytest.raises(ValueError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    assert_healthy(server, 1)


def test_a_missing_input_is_named(server: HostServer) -> None:
    status, answer = server.post("/prompt", {"prompt": {
        "1": {"class_type": "LatentMotionApplyMotionModule", "inputs": {}},
        "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "x"}},
    }})  # fmt: skip
    assert status == 400
    missing = {error["details"] for error in answer["node_errors"]["1"]["errors"]}
    assert {"model", "motion_module"} <= missing
    assert_healthy(server, 2)


def test_a_failing_node_is_reported(server: HostServer) -> None:
    entry = server.run(plain_graph(width=33))  # h264 has no odd sizes
    assert entry["status"]["status_str"] == "error"
    assert_healthy(server, 3)


def test_a_host_that_dies_shows_its_log(host_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"(?s)ended while starting.*--no-such-option"):
        HostServer(Path(sys.executable), host_path, tmp_path, ["--no-such-option"]).start()


SERVE = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so do those of nohup
    from pathlib import Path
    sys.path.insert(0, {scripts!r})
    import run
    from hosts import Host
    run.find = lambda named, cache: Host(Path({host!r}), "under test", in_place=True)
    sys.exit(run.main(["serve", "--port", "{port}"]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_serve_ends_with_its_server(host_path: Path, tmp_path: Path, how: signal.Signals) -> None:
    port = free_port()
    code = textwrap.dedent(SERVE).format(scripts=str(SCRIPTS), host=str(host_path), port=port)
    environment = os.environ | {"LATENTMOTION_CACHE": str(tmp_path)}
    serve = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    said = iter(serve.stdout.readline, "")
    assert any("Open http://127.0.0.1" in line for line in said)
    serve.send_signal(how)
    assert serve.wait(30) == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}.get(how, 128 + how)
    begun = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - begun < 5:
            ask(f"http://127.0.0.1:{port}/system_stats", timeout=2).close()
