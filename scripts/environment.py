"""The Python environment of a host and the pack: a virtual environment in the cache, trusted only when complete.

It is built under a temporary name, marked by a stamp file, then renamed; so a killed pip, a full disk or a lost network
leaves nothing that a later run takes for an environment. A lock that dies with its process keeps two runs apart.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from console import Progress, SetupError, say, tail

STAMP = ".complete"
FREE_GIGABYTES = 8
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""What a lock that another process holds is answered with."""
PIP_FOR_OTHERS = (22, 3)
"""The first pip that installs into another environment (`--python`)."""
VENV = "On Debian and Ubuntu: apt-get install python3-venv"
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
"""What a place is answered with that is full, and one that is none to write to: EEXIST where a file has its name."""
FULL_DISK = (
    "The disk is full: an environment takes about 6 GB. Free some, or name folders on another disk with "
    "$LATENTMOTION_CACHE and, for what pip unpacks, $TMPDIR; then run this again."
)
NO_RIGHT = (
    "A folder may not be written to: $LATENTMOTION_CACHE can name another one for environments and hosts, $TMPDIR one "
    "for what pip unpacks."
)
NO_INDEX = "The package index did not answer. Check the network, then run this again."
HINTS = (
    ("No space left on device", FULL_DISK),
    ("Disk quota exceeded", FULL_DISK),
    ("THESE PACKAGES DO NOT MATCH THE HASHES", "A download arrived damaged. Run this again."),
    ("Requires-Python", "This Python may be too new or too old for a package: try Python 3.10 to 3.13."),
    ("Temporary failure in name resolution", "There seems to be no network. Connect, then run this again."),
    ("Failed to establish a new connection", NO_INDEX),
    ("Connection refused", NO_INDEX),
    ("Read timed out", "The network is too slow or was lost. Run this again: what was downloaded is kept by pip."),
    ("No matching distribution found", "pip cannot find a package: no network, or an index without it."),
    ("Read-only file system", NO_RIGHT),
    ("Permission denied", NO_RIGHT),
)


@dataclass(frozen=True)
class Recipe:
    """What an environment is made of: requirement files, single requirements, and the Python that runs them."""

    label: str
    files: tuple[Path, ...]
    extra: tuple[str, ...] = ()

    def key(self) -> str:
        """Name of the environment's folder: the label and a hash of everything that decides what is installed."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.read_bytes() + b"\0")
        python = (*sys.version_info[:2], sys.base_prefix, sys.platform, platform.machine())
        digest.update(repr((self.extra, python)).encode())
        return f"{self.label}-{digest.hexdigest()[:12]}"


def cache_folder() -> Path:
    """Where environments and hosts are kept: $LATENTMOTION_CACHE, else ~/.cache/latentmotion."""
    return Path(os.environ.get("LATENTMOTION_CACHE") or Path.home() / ".cache" / "latentmotion").expanduser().absolute()


@contextlib.contextmanager
def kept_in(cache: Path) -> Iterator[None]:
    """Work that writes into the cache. Where the disk or a missing right ends it, that is said with what to do.

    Raises: SetupError in place of such an OSError. One about another place passes through as it is.
    """
    try:
        yield
    except OSError as error:
        place = None if error.filename is None else Path(os.fsdecode(error.filename))
        ours = place is None or place == cache or cache in place.parents or place in cache.parents
        if error.errno in FULL and ours:
            advice = FULL_DISK
        elif error.errno in REFUSED and ours and place is not None:
            advice = "Make it a folder that you may write to, or let $LATENTMOTION_CACHE name another."
        else:
            raise
        reason = error.strerror if place is None else f"{error.strerror}: {place}"
        raise SetupError(f"Nothing can be kept in {cache}: {reason}. {advice}") from None


def writable(folder: Path, what: str, otherwise: str = "copy this checkout to another place") -> Path:
    """A folder that `what` goes to, made where it is missing. otherwise: what else a person can do.

    Raises: SetupError when nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        advice = "Free some space" if error.errno in FULL else "Make it a folder that you may write to"
        raise SetupError(
            f"{what} cannot be written to {folder}: {error.strerror}. {advice}, or {otherwise}."
        ) from None
    return folder


def python_of(folder: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_complete(folder: Path) -> bool:
    """Whether `folder` was finished and its interpreter still starts."""
    if not (folder / STAMP).is_file():
        return False
    try:
        return subprocess.run([python_of(folder), "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:  # the Python it was made of is gone
        return False


@contextlib.contextmanager
def locked(file: Path, what: str, refusal: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the system drops it when the process ends, however it ends.

    Raises: SetupError with `refusal`, if one is given, where another process holds it; else that one is waited for.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as handle:
        if not _try_lock(handle):
            if refusal is not None:
                raise SetupError(refusal)
            say(f"Another run is busy with {what}; waiting for it ...")
            while not _try_lock(handle):
                threading.Event().wait(0.5)
        yield


def _try_lock(handle: IO[Any]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            return False
        say(f"  careful: files cannot be locked on this disk ({error.strerror}); do not run this twice at once")
    return True


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Delete what a killed run left beside its goal. Call with the lock held."""
    for leftover in folder.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def ensure(recipe: Recipe, cache: Path) -> Path:
    """The interpreter of a complete environment for `recipe`, built now if there is none.

    Raises: SetupError saying what failed and what to do; the cache then holds nothing that would be trusted.
    """
    folder = cache / "envs" / recipe.key()
    with kept_in(cache):
        if is_complete(folder):
            return python_of(folder)
        with locked(cache / "envs" / f"{folder.name}.lock", "the same environment"):
            if not is_complete(folder):  # the run that was waited for may have built it
                _build(recipe, folder)
    return python_of(folder)


def _build(recipe: Recipe, folder: Path) -> None:
    partial = f".partial-{folder.name}-"
    remove_leftovers(folder.parent, partial)
    building = folder.parent / f"{partial}{uuid.uuid4().hex[:8]}"
    log = folder.parent.parent / "logs" / f"{folder.name}.log"
    say(f"Building the Python environment in {folder}")
    say("  about 3 minutes where pip has the packages, 10 or more where it must download some 3 GB; 6 GB on disk")
    free = shutil.disk_usage(folder.parent).free / 1e9
    if free < FREE_GIGABYTES:
        say(f"  careful: only {free:.1f} GB free on this disk")
    try:
        pip = _create(building, log)
        arguments = [part for file in recipe.files for part in ("-r", str(file))]
        _install([*pip, "install", "--no-input", "--progress-bar", "off", *arguments, *recipe.extra], log)
        (building / STAMP).write_text("complete\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # an older one that is_complete refused
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _create(folder: Path, log: Path) -> list[str]:
    """Make an empty virtual environment; the pip command that installs into it."""
    own_pip = importlib.util.find_spec("ensurepip") is not None
    log.parent.mkdir(parents=True, exist_ok=True)
    python = str(python_of(folder))
    commands = [[sys.executable, "-m", "venv", "--without-pip", str(folder)]]
    if own_pip:  # a step of its own: venv does not show what it says
        commands.append([python, "-I", "-m", "ensurepip", "--default-pip"])
    for command in commands:
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        log.write_bytes(made.stdout)
        if made.returncode != 0:
            advice = advice_for(made.stdout.decode(errors="replace"), made.returncode, VENV)
            raise SetupError(f"Python could not make a virtual environment in {folder}:\n{tail(log)}\n{advice}")
    return [python, "-m", "pip"] if own_pip else [*_own_pip(PIP_FOR_OTHERS), "--python", python]


def any_pip(spare: Path) -> list[str]:
    """A pip command: that of the Python that runs this script, else of a small environment made in `spare`."""
    if importlib.util.find_spec("pip") is None and importlib.util.find_spec("ensurepip") is not None:
        return _create(spare / "pip", spare / "pip.log")
    return _own_pip()


def _own_pip(oldest: tuple[int, int] = (0, 0)) -> list[str]:
    """The pip of the Python that runs this script. Raises: SetupError when it has none, or one before `oldest`."""
    if importlib.util.find_spec("pip") is None:
        raise SetupError(f"{sys.executable} has neither pip nor ensurepip. {VENV}")
    version = importlib.metadata.version("pip")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < oldest:
        raise SetupError(f"{sys.executable} has no ensurepip, and its pip {version} is too old to do without. {VENV}")
    return [sys.executable, "-m", "pip"]


def advice_for(text: str, code: int, otherwise: str = "Run this again once the cause is gone.") -> str:
    """What to do about a pip that printed `text` and failed with this exit code; `otherwise` where no sign is known."""
    if code < 0:
        return f"pip was killed (signal {-code}); if nobody did that, the memory ran out. Run this again."
    return next((advice for sign, advice in HINTS if sign in text), otherwise)


def _install(command: list[str], log: Path) -> None:
    """Run pip, its whole output in `log` and what it is busy with on one line.

    Raises: SetupError with pip's last lines and what to do.
    """
    progress = Progress()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    current = ["starting pip"]
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            progress.show(current[0])

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        with open(log, "a", encoding="utf-8") as output:
            for line in process.stdout:
                output.write(line)
                output.flush()
                if line.startswith("Installing collected packages:"):
                    current[0] = f"installing {line.count(',') + 1} packages"
                elif line.lstrip().startswith(("Collecting", "Downloading", "Building")):
                    current[0] = line.split("(")[0].strip()[:90]
        code = process.wait()
    finally:
        done.set()
        ticker.join()
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code != 0:
        advice = advice_for(log.read_text(encoding="utf-8", errors="replace"), code)
        raise SetupError(f"pip failed; nothing was kept. Its last lines ({log}):\n{tail(log, 12)}\n{advice}")
    progress.end("environment complete")
