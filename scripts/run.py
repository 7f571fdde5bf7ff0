"""Everything this pack can be asked to do, from one command that needs nothing but Python 3.10 or newer.

    python3 scripts/run.py demo [--json FILE]         make a moving clip in a real ComfyUI; prints where it is
                          [--workflow FILE]     the graph to run, in API format (workflows/api/text_to_video.json)
    python3 scripts/run.py test [PYTEST ARGUMENT ...] run every test (or the paths under tests/ that are named)
    python3 scripts/run.py serve [--port N] [ARGUMENT ...]   ComfyUI with this pack, arguments go to its main.py
    python3 scripts/run.py bench [NAME [--json FILE]] run one measurement; without a name, list them
    python3 scripts/run.py train RECIPE               train what a TOML or JSON file describes; Ctrl-C keeps the state
    python3 scripts/run.py train-demo [ARGUMENT ...]  train the demo models again
    python3 scripts/run.py lint                       check the style of the code

Every verb takes --comfyui PATH (or $COMFYUI_PATH), a ComfyUI to use; without it, the one this checkout sits in, else a
pinned copy that is fetched. Environments and hosts are kept in $LATENTMOTION_CACHE (~/.cache/latentmotion).
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (somebody may well start this with an older one, which must parse it all)
    sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")

import argparse
import ast
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an embedded or isolated Python leaves it out

from console import SetupError, say, tail
from environment import cache_folder, kept_in, locked, writable
from host_server import HostServer, free_port
from hosts import ROOT, Host, find
from processes import end_as_by_exit, run_to_its_end
from suites import run_tests

Finder = Callable[[], Host]
"""Finds the host when a verb needs it, which may take a download: what is wrong with the command is said before."""
PORT = 8188
HELP = ("-h", "--help", "help")
WORKFLOW = ROOT / "workflows" / "api" / "text_to_video.json"


def options_of(verb: str, arguments: list[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Read this verb's own options; the rest is returned as it was."""
    parser = argparse.ArgumentParser(prog=f"run.py {verb}", allow_abbrev=False, add_help=False)
    for name in names:
        parser.add_argument(name)
    return parser.parse_known_args(arguments)


def refuse_rest(verb: str, rest: list[str]) -> None:
    """Stop at an argument nobody reads."""
    if rest:
        raise SetupError(f"run.py {verb} does not know {' '.join(rest)}. `python3 scripts/run.py` lists the verbs.")


def check_graph(file: Path) -> None:
    """Raise SetupError unless `file` holds a graph in API format."""
    try:
        graph = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"--workflow names {file}, which cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SetupError(f"--workflow names {file}, which is not JSON: {error}.") from None
    if isinstance(graph, dict) and "nodes" in graph:
        raise SetupError(
            f"{file} is a workflow of the canvas. Here one in API format is needed: take it from workflows/api/, or "
            "save yours with File > Export (API)."
        )
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise SetupError(f"{file} is JSON, but not a ComfyUI graph in API format, as those in workflows/api/ are.")


def figures_file(asked: str | None) -> Path | None:
    """The file that --json names, in a folder that is there: minutes or hours of work end in it."""
    if not asked:
        return None
    return writable(Path(asked).absolute().parent, "The figures", "name another with --json") / Path(asked).name


def demo(find_host: Finder, cache: Path, arguments: list[str]) -> int:
    """Boot the host, make the clip of workflows/api/text_to_video.json, and write it to output/."""
    begun = time.monotonic()
    options, rest = options_of("demo", arguments, "--json", "--workflow")
    refuse_rest("demo", rest)
    graph = Path(options.workflow or WORKFLOW)
    check_graph(graph)
    output = writable(ROOT / "output", "The clip")
    facts = figures_file(options.json)
    host = find_host()
    python = host.python(cache)
    folder = tempfile.TemporaryDirectory(prefix="latentmotion-demo-", ignore_cleanup_errors=True)
    with folder as base, HostServer(python, host.path, Path(base)) as server:
        client = [str(python), str(ROOT / "scripts" / "make_clip.py"), "--url", server.url]
        client += ["--workflow", str(graph), "--folder", str(output)]
        client += ["--json", str(facts)] if facts else []
        code = subprocess.run(client, check=False).returncode
        if code != 0:
            say("The end of ComfyUI's own log:\n" + "\n".join(f"    {line}" for line in server.log_lines()[-30:]))
    if code == 0 and facts:
        written = json.loads(facts.read_text(encoding="utf-8"))
        written |= {"host": host.version, "total_seconds": round(time.monotonic() - begun, 2)}
        facts.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return code


def port_for(asked: str | None) -> int:
    """The port to serve at: the one that is asked for, else 8188 or the first one after it that nobody listens on.

    Raises: SetupError when `asked` is no port, or one that is taken.
    """
    if asked is None:
        return next((port for port in range(PORT, PORT + 100) if free_port(port)), None) or free_port()
    if not (asked.isdecimal() and 0 < int(asked) < 65536):
        raise SetupError(f"--port is {asked}, and must be a number from 1 to 65535.")
    if not free_port(int(asked)):
        raise SetupError(f"Port {asked} is taken by another program, or needs rights you do not have. Name another.")
    return int(asked)


def serve(find_host: Finder, cache: Path, arguments: list[str]) -> int:
    """Run the host with the pack until Ctrl-C; its models, input and user folders stay in the cache."""
    options, rest = options_of("serve", arguments, "--port")
    port = port_for(options.port)
    base = cache / "serve"
    with kept_in(cache):
        base.mkdir(parents=True, exist_ok=True)
    extra = ["--output-directory", str(writable(ROOT / "output", "What ComfyUI makes")), *rest]
    host = find_host()
    running = f"`run.py serve` is running already on the folders in {base}. Use that one, or end it first."
    with contextlib.ExitStack() as stack:
        with kept_in(cache):
            stack.enter_context(locked(base / "serve.lock", "serve", running))
            server = stack.enter_context(HostServer(host.python(cache), host.path, base, extra, port))
        say(f"Open {server.url} in a browser; Ctrl-C ends it. Models go to {base / 'models'}, its log is {server.log}")
        code = server.process.wait()
        say(f"ComfyUI ended by itself (exit code {code}):\n{tail(server.log)}")
        return code


def in_pack(find_host: Finder, cache: Path, module: str, arguments: list[str]) -> int:
    """Run one module of the pack with the host on the path, through scripts/pack.py."""
    host = find_host()
    environment = os.environ | {"COMFYUI_PATH": str(host.path)}
    command = [str(host.python(cache)), str(ROOT / "scripts" / "pack.py"), module, *arguments]
    return run_to_its_end(command, env=environment)


def train(find_host: Finder, cache: Path, arguments: list[str]) -> int:
    """Carry out a recipe. Ctrl-C and SIGTERM reach the training, which keeps its state before it ends."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise SetupError(f"run.py train takes one recipe, a TOML or JSON file{_not_there(arguments)}.")
    host = find_host()
    environment = os.environ | {"COMFYUI_PATH": str(host.path)}
    command = [str(host.python(cache)), str(ROOT / "scripts" / "pack.py"), "nodes.recipe", *arguments]
    process = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the training as well
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, lambda *_: process.terminate())
    return process.wait()


def _not_there(arguments: list[str]) -> str:
    return f"; there is no file {arguments[0]}" if len(arguments) == 1 else ""


def benchmarks() -> dict[str, str]:
    """Every file of bench/ that has a `main`, and the first line of its docstring."""
    found = {}
    for file in sorted((ROOT / "bench").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def bench(find_host: Finder, cache: Path, arguments: list[str]) -> int:
    """Run one measurement, or list them."""
    known = benchmarks()
    if not arguments:
        say("\n".join(f"  {name:20s} {line}" for name, line in known.items()) or "There are no measurements yet.")
        return 0
    name, *rest = arguments
    if name not in known:
        raise SetupError(f"There is no measurement called {name}; there are: {', '.join(known)}.")
    figures_file(options_of("bench", rest, "--json")[0].json)
    return in_pack(find_host, cache, f"bench.{name}", rest)


def lint(find_host: Finder, cache: Path, arguments: list[str]) -> int:
    """Check the style of the code with ruff, as pyproject.toml sets it."""
    command = [str(find_host().python(cache, "ruff", tools_only=True)), "-m", "ruff", "check", *(arguments or ["."])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def run(verb: str, arguments: list[str], comfyui: str | None) -> int:
    """Carry out one verb."""
    cache = cache_folder()

    def find_host() -> Host:
        return find(comfyui, cache)

    verbs: dict[str, Callable[[], int]] = {
        "demo": lambda: demo(find_host, cache, arguments),
        "test": lambda: run_tests(find_host(), cache, arguments),
        "serve": lambda: serve(find_host, cache, arguments),
        "bench": lambda: bench(find_host, cache, arguments),
        "train": lambda: train(find_host, cache, arguments),
        "train-demo": lambda: in_pack(find_host, cache, "demo.train", arguments),
        "lint": lambda: lint(find_host, cache, arguments),
    }
    if verb not in verbs:
        raise SetupError(f"There is no verb {verb}; there are: {', '.join(verbs)}.")
    return verbs[verb]()


def main(argv: list[str]) -> int:
    options, rest = options_of("", argv, "--comfyui")
    own = rest[:1] in (["demo"], ["serve"], ["train"], ["lint"])  # pytest and the measurements have helps of their own
    if not rest or rest[0] in HELP or (own and rest[1:2] and rest[1] in HELP):
        print(__doc__)
        return 0
    end_as_by_exit()  # so that servers and half-built folders are cleared away
    try:
        return run(rest[0], rest[1:], options.comfyui)
    except SetupError as error:
        say(f"\nStopped: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped by Ctrl-C; nothing half-made was kept.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
