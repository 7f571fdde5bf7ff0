"""The folders that scripts/run.py works in, and what it says of one that cannot be written to."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import environment
import hosts
import pytest
import run
import suites
from console import SetupError
from environment import Recipe
from hosts import FLOOR, Host

SCRIPTS = Path(run.__file__).parent
PROBE = """
import hosts
hosts.fetch = lambda *_: hosts.Path("fetched")
print(hosts.find(None, hosts.Path("cache")).path)
"""
NO_SPACE = r"(?s)No space left on device.*6 GB.*\$LATENTMOTION_CACHE"


def raising(number: int, *place: str) -> Callable[..., None]:
    """A function that the system answers with the error `number`, about `place`."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), *place)

    return refuse


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_cache_that_is_no_folder_is_named(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / below
    sentence = f"Nothing can be kept in {cache}: Not a directory: "
    with pytest.raises(SetupError, match=rf"{sentence}.*\$LATENTMOTION_CACHE"):
        hosts.fetch(FLOOR, cache)
    monkeypatch.setattr(run, "find", lambda *_: Host(run.ROOT, "9.9"))
    monkeypatch.setattr(Host, "recipe", lambda _: Recipe("test", ()))
    monkeypatch.setenv("LATENTMOTION_CACHE", str(cache))
    for verb in ("serve", "demo", "lint"):
        assert run.main([verb]) == 1
        assert f"Stopped: {sentence}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST])
def test_a_cache_that_refuses_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is refused may be the cache, one of its own, or one that it would lie in."""
    for refused in (tmp_path, tmp_path / "cache", tmp_path / "cache" / "hosts"):
        monkeypatch.setattr(Path, "mkdir", raising(number, str(refused)))
        with pytest.raises(SetupError, match=rf"{os.strerror(number)}: {refused}\. .*\$LATENTMOTION_CACHE"):
            hosts.fetch(FLOOR, tmp_path / "cache")


@pytest.mark.parametrize("arguments", [(errno.ENOENT, "/elsewhere"), (errno.ENOSPC, "/elsewhere"), (errno.EIO,)])
def test_what_goes_wrong_elsewhere_is_not_blamed_on_the_cache(arguments: tuple, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(arguments[0])), environment.kept_in(tmp_path):
        raising(*arguments)()


@pytest.mark.parametrize("part", ["_create", "_install", "_stamp"])
def test_an_environment_that_did_not_fit_is_not_trusted(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_create", lambda folder, _: folder.mkdir() or ["pip"])
    monkeypatch.setattr(environment, "_install", lambda *_: None)
    what, name = (Path, "write_text") if part == "_stamp" else (environment, part)
    monkeypatch.setattr(what, name, raising(errno.ENOSPC))
    with pytest.raises(SetupError, match=NO_SPACE):
        environment.ensure(Recipe("test", ()), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "envs").iterdir()] == [".lock"]


@pytest.mark.parametrize(("said", "advice"), [
    ("[Errno 28] No space left on device", "disk is full"),
    ("[Errno 122] Disk quota exceeded", "disk is full"),
    ("[Errno 13] Permission denied: x", "may not be written to"),
    ("No module named _ctypes", "apt-get install python3-venv"),
])  # fmt: skip
def test_what_keeps_pip_out_of_an_environment_is_said(
    said: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{said}'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(environment, "python_of", lambda _: python)
    with pytest.raises(SetupError) as stopped:
        environment._create(tmp_path / "env", tmp_path / "log")
    assert said in str(stopped.value) and advice in str(stopped.value)


@pytest.fixture(params=["the checkout", "custom_nodes"])
def linked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A ComfyUI with this checkout as custom_nodes/pack, of which one or the other is a link to elsewhere/."""
    comfyui, checkout = tmp_path / "ComfyUI", tmp_path / "elsewhere" / "pack"
    for name in ("main.py", "requirements.txt", "comfy/model_patcher.py"):
        (comfyui / name).parent.mkdir(parents=True, exist_ok=True)
        (comfyui / name).touch()
    shutil.copytree(SCRIPTS, checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "scripts" / "probe.py").write_text(PROBE)
    if request.param == "custom_nodes":
        (comfyui / "custom_nodes").symlink_to(checkout.parent)
    else:
        (comfyui / "custom_nodes").mkdir()
        (comfyui / "custom_nodes" / "pack").symlink_to(checkout)
    return comfyui


def host_found(folder: Path, script: str, shell: Path) -> str:
    """What the scripts find when one is started in `folder`, which the shell believes to be `shell`."""
    variables = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"} | {"PWD": str(shell)}
    return subprocess.check_output([sys.executable, "-B", script], cwd=folder, env=variables, text=True).strip()


@pytest.mark.parametrize(("folder", "script"), [
    ("", "custom_nodes/pack/scripts/probe.py"),
    ("custom_nodes", "./pack/scripts/probe.py"),
    ("custom_nodes/pack", "scripts/probe.py"),
    ("custom_nodes/pack/scripts", "probe.py"),
    ("custom_nodes/pack/scripts", "../scripts/probe.py"),
])  # fmt: skip
def test_a_checkout_linked_into_custom_nodes_sits_there(folder: str, script: str, linked: Path) -> None:
    assert host_found(linked / folder, script, linked / folder) == str(linked)


def test_a_link_that_the_command_did_not_take_is_not_followed(linked: Path, tmp_path: Path) -> None:
    checkout, link = tmp_path / "elsewhere" / "pack", linked / "custom_nodes" / "pack"
    assert host_found(tmp_path, str(link / "scripts" / "probe.py"), tmp_path) == str(linked)
    assert host_found(checkout, "scripts/probe.py", checkout) == "fetched"
    assert host_found(tmp_path, str(checkout / "scripts" / "probe.py"), link) == "fetched"
    assert host_found(tmp_path, "elsewhere/pack/scripts/probe.py", link / "gone") == "fetched"


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (["demo"], "output"), (["serve"], "output"), (["test"], "test-results"),
        (["demo", "--json", "FILE/x.json"], "FILE"), (["bench", "toy", "--json", "FILE/x.json"], "FILE"),
    ],
)  # fmt: skip
def test_a_place_for_results_that_is_no_folder_is_named_before_anything_is_made(
    command: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / place).touch()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "REPORTS", tmp_path / "test-results")
    monkeypatch.setattr(run, "benchmarks", lambda: {"toy": ""})
    monkeypatch.setattr(run, "find", lambda *_: Host(run.ROOT, "9.9"))
    monkeypatch.setattr(Host, "python", lambda *_: pytest.fail("an environment is made"))
    monkeypatch.setenv("LATENTMOTION_CACHE", str(tmp_path / "cache"))
    assert run.main([argument.replace("FILE", str(tmp_path / "FILE")) for argument in command]) == 1
    said = capsys.readouterr().out
    advice = "name another with --json" if place == "FILE" else "copy this checkout"
    assert f"cannot be written to {tmp_path / place}: " in said and advice in said
