"""The folders that scripts/run.py works in, and what it says of one that cannot be written to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import environment
import hosts
import pytest
import run
from console import SetupError
from environment import Recipe
from hosts import FLOOR, Host

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
