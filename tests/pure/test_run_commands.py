"""What scripts/run.py says to a command before it sets anything up, and how it ends what it has started."""

from __future__ import annotations

import ast
import errno
import fcntl
import http.server
import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import environment
import host_server
import pytest
import run
from console import SetupError

SCRIPTS = Path(run.__file__).parent


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for the host has begun to set up."""
    monkeypatch.setattr(run, "find", lambda *_: pytest.fail("set up before the command was read"))


GRAPHS = {
    "canvas.json": (json.dumps({"nodes": [], "links": []}), "is a workflow of the canvas.*workflows/api/"),
    "list.json": ("[1, 2]", "not a ComfyUI graph in API format"),
    "settings.json": ('{"1": {"inputs": {}}}', "not a ComfyUI graph in API format"),
    "broken.json": ("{", "is not JSON"),
}


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize("name", [*GRAPHS, "missing.json"])
def test_what_is_no_graph_is_said_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, sentence = GRAPHS.get(name, (None, "cannot be read: No such file"))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SetupError, match=f"(?s){sentence}"):
        run.check_graph(tmp_path / name)
    assert run.main(["demo", "--workflow", str(tmp_path / name)]) == 1
    assert "Stopped: " in capsys.readouterr().out


def test_every_graph_of_the_pack_can_be_named() -> None:
    for file in sorted((run.ROOT / "workflows" / "api").glob("*.json")):
        run.check_graph(file)


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize(("command", "sentence"), [
    (["serve", "--port", "abc"], "--port is abc, and must be a number from 1 to 65535"),
    (["serve", "--port", "70000"], "must be a number from 1 to 65535"),
    (["train"], "takes one recipe, a TOML or JSON file."),
    (["train", "no_such.toml"], "there is no file no_such.toml"),
    (["demo", "--jsn", "x"], "run.py demo does not know --jsn x"),
], ids=" ".join)  # fmt: skip
def test_a_wrong_command_sets_nothing_up(
    command: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command) == 1 and sentence in capsys.readouterr().out


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize("verb", ["demo", "serve", "train", "lint"])
def test_help_sets_nothing_up(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([verb, "--help"]) == 0 and "python3 scripts/run.py demo" in capsys.readouterr().out


def test_a_port_that_is_taken_is_not_served_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert host_server.free_port(taken) is None
        with pytest.raises(SetupError, match=f"Port {taken} is taken"):
            run.port_for(str(taken))
        monkeypatch.setattr(run, "PORT", taken)
        assert taken < run.port_for(None) <= taken + 99


def test_a_second_serve_is_refused_and_a_lock_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    with environment.locked(file, "this"), pytest.raises(SetupError, match="end it first"):
        environment.locked(file, "this", "end it first").__enter__()
    with environment.locked(file, "this", "end it first"):
        pass


def test_a_disk_without_locks_is_no_reason_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with environment.locked(tmp_path / "a.lock", "this"):
        assert "cannot be locked on this disk (No locks available)" in capsys.readouterr().out


def test_an_environment_whose_python_is_gone_is_not_trusted(tmp_path: Path) -> None:
    python = environment.python_of(tmp_path)
    python.parent.mkdir()
    python.symlink_to(tmp_path / "uninstalled")
    (tmp_path / environment.STAMP).touch()
    assert not environment.is_complete(tmp_path)


def test_an_old_pip_is_no_dead_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = {"ensurepip"}
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name in absent else object())
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda _: "22.0.2")
    assert environment.any_pip(tmp_path) == [sys.executable, "-m", "pip"]  # it downloads as well as any
    with pytest.raises(SetupError, match=r"pip 22\.0\.2 is too old.*apt-get install python3-venv"):
        environment._create(tmp_path / "env", tmp_path / "log")
    absent.add("pip")
    with pytest.raises(SetupError, match="neither pip nor ensurepip.*apt-get install python3-venv"):
        environment.any_pip(tmp_path)


def test_without_pip_one_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    pip = environment.any_pip(tmp_path)
    assert pip[0].startswith(str(tmp_path))
    assert subprocess.run([*pip, "--version"], capture_output=True, text=True, check=True).stdout.startswith("pip ")


def test_the_scripts_start_where_python_leaves_their_folder_out() -> None:
    said = subprocess.run([sys.executable, "-I", run.__file__, "danse"], capture_output=True, text=True, check=False)
    assert said.returncode == 1 and "There is no verb danse" in said.stdout


def test_an_old_python_is_told_what_is_needed() -> None:
    """It reads the whole file before it does the first line, and 3.6 knows no annotations from __future__."""
    source = Path(run.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 7))
    assert "with (" not in source, "brackets are for 3.9, and 3.13 does not say so"
    first = [ast.unparse(node).splitlines()[0] for node in tree.body[1:3]]
    assert first == ["import sys", "if sys.version_info < (3, 10):"]


CHILD = """
    import pathlib, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pathlib.Path({started!r}).touch()
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)  # longer than the quarter of a second that subprocess.run gives
        pathlib.Path({cleared!r}).touch()
"""
PARENT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that nohup started inherit that it is ignored
    sys.path.insert(0, {scripts!r})
    from processes import end_as_by_exit, run_to_its_end
    end_as_by_exit()
    print("started", flush=True)
    run_to_its_end([sys.executable, "-c", {child!r}])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_started_clears_up_first(tmp_path: Path, how: signal.Signals) -> None:
    started, cleared = tmp_path / "started", tmp_path / "cleared"
    child = textwrap.dedent(CHILD).format(started=str(started), cleared=str(cleared))
    code = textwrap.dedent(PARENT).format(scripts=str(SCRIPTS), child=child)
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not started.exists():
        assert parent.poll() is None
    parent.send_signal(how)
    assert parent.wait(30) in (-signal.SIGINT, 128 + how)
    assert cleared.exists()


class Answer(http.server.BaseHTTPRequestHandler):
    """Says what it was asked for."""

    def do_GET(self) -> None:
        text = json.dumps([self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()]).encode()
        self.send_response(200 if self.path == "/known" else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""


def test_a_server_of_this_machine_is_not_asked_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        server = host_server.HostServer(Path(sys.executable), tmp_path, tmp_path, port=answering.server_port)
        assert server.get("/known", 5) == ["/known", ""]
        assert server.post("/known", {"a": 1}, 5) == (200, ["/known", '{"a": 1}'])
        assert server.post("/unknown", {}, 5) == (404, ["/unknown", "{}"])
        with host_server.ask(f"{server.url}/known", 5) as answer:
            assert json.load(answer) == ["/known", ""]
        answering.shutdown()


def test_a_server_ends_when_its_pipe_is_closed(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text("import sys, time\nprint(sys.argv, sys.path[0], __name__, flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(host_server.ATTENDED), str(script), "--cpu"]
    served = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert served.stdout.readline().split() == [f"['{script}',", "'--cpu']", str(tmp_path), "__main__"]
    served.stdin.close()
    assert served.wait(30) == -signal.SIGTERM
    served.stdout.close()
