"""A ComfyUI server with this checkout linked in, in a process of its own that ends with ours."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from console import Progress, SetupError, tail
from pack import ON_CPU

ROOT = Path(__file__).resolve().parent.parent
ATTENDED = Path(__file__).resolve().parent / "attended.py"
PACK_NAME = "ComfyUI-LatentMotion"
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri")


def free_port(wanted: int = 0) -> int | None:
    """A TCP port nobody listens on at this moment, or `wanted` if that is one, else None."""
    with socket.socket() as probe:
        if os.name != "nt":  # there it would let two listen on one port; here it forgives a server that just ended
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return None
        return probe.getsockname()[1]


def has_gpu(python: Path) -> bool:
    """Whether that environment's torch can compute on something other than the CPU."""
    if sys.platform == "linux" and not any(Path(device).exists() for device in GPU_DEVICES):
        return False  # saves the seconds that importing torch takes
    test = (
        "import sys, torch; x = getattr(torch, 'xpu', None); "
        "sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available() or (x and x.is_available())))"
    )
    return subprocess.run([python, "-c", test], capture_output=True, check=False).returncode == 0


def link_pack(base: Path) -> None:
    """Make the checkout a custom node pack of the base directory (linked; copied where links are not allowed)."""
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    target = base / "custom_nodes" / PACK_NAME
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", "output", "tests", "test-results"))


def ask(address: str | urllib.request.Request, timeout: float = 30.0) -> http.client.HTTPResponse:
    """The answer of a server on this machine, past the proxy of the environment, for which 127.0.0.1 is itself."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=timeout)


class HostServer:
    """`with HostServer(python, host, base) as server:` boots ComfyUI and waits until it answers at `server.url`.

    `base` is its base directory (models/, input/, output/ ...), `arguments` go to its main.py, its output to `log`.
    Raises: SetupError with the end of the log when it dies or does not answer, or when the pack did not load.
    """

    def __init__(
        self, python: Path, host: Path, base: Path, arguments: Sequence[str] = (), port: int | None = None
    ) -> None:
        self.python, self.host, self.base = python, host, base
        self.arguments = list(arguments)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> HostServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def command(self) -> list[str]:
        """The command line that starts the host."""
        line = [str(self.python), "-u", str(ATTENDED), str(self.host / "main.py"), "--base-directory", str(self.base)]
        line += ["--port", str(self.port), "--disable-auto-launch", "--disable-api-nodes"]
        if "--database-url" in (self.host / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
            line += ["--database-url", "sqlite:///:memory:"]
        if not has_gpu(self.python):
            chosen = any("cross-attention" in argument for argument in self.arguments)
            line += [flag for flag in ON_CPU if flag not in self.arguments and not (chosen and "attention" in flag)]
        return line + self.arguments

    def start(self, patience: float = 600.0) -> None:
        """Start the host and wait up to `patience` seconds for it to answer."""
        link_pack(self.base)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("COMFYUI_PATH", None)
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.host,
                env=environment,
                stdin=subprocess.PIPE,  # held open: see attended.py
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it
            )
        try:
            self._wait(patience)
        except BaseException:
            self.stop()
            raise

    def _wait(self, patience: float) -> None:
        progress = Progress()
        while True:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise SetupError(f"ComfyUI ended while starting (exit code {code}):\n{tail(self.log)}")
            if time.monotonic() - progress.begun > patience:
                raise SetupError(f"ComfyUI did not answer within {patience:.0f} s:\n{tail(self.log)}")
            try:
                self.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                progress.show("starting ComfyUI (about 20 s)")
                time.sleep(0.3)
        failed = [line for line in self.log_lines() if "IMPORT FAILED" in line and PACK_NAME in line]
        if failed:
            raise SetupError(f"ComfyUI started, but could not import this pack:\n{tail(self.log, 60)}")
        progress.end(f"ComfyUI answers at {self.url}")

    def stop(self) -> None:
        """End the server process by its id, kindly first."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()

    def log_lines(self) -> list[str]:
        """What the server has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def get(self, path: str, timeout: float = 30.0) -> Any:
        """The JSON answer of a GET request."""
        with ask(self.url + path, timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> tuple[int, Any]:
        """Status and JSON answer (None where empty) of a POST request with a JSON body; 4xx and 5xx do not raise."""
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with ask(request, timeout) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text) if text else None
        except ValueError:
            return status, text.decode(errors="replace")

    def run(self, prompt: dict[str, Any], patience: float = 600.0) -> dict[str, Any]:
        """Queue an API-format graph and wait for its /history entry (`outputs`, `status`).

        Raises: ValueError with the host's own explanation when the graph is refused.
        """
        status, answer = self.post("/prompt", {"prompt": prompt})
        if status != 200:
            raise ValueError(json.dumps(answer, indent=1))
        prompt_id, begun = answer["prompt_id"], time.monotonic()
        while time.monotonic() - begun < patience:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            if self.process is not None and self.process.poll() is not None:
                raise SetupError(f"ComfyUI ended while running a graph:\n{tail(self.log)}")
            time.sleep(0.2)
        raise TimeoutError(f"the graph did not finish within {patience:.0f} s:\n{tail(self.log)}")
