"""Import the pack, and a real ComfyUI beside it, outside of a running server.

Tests, benchmarks and the demo trainer all enter through here:

    python scripts/pack.py MODULE [ARG ...]      # runs latentmotion.MODULE.main([ARG ...])

`$COMFYUI_PATH` names the host to put on the path; without it only the host-free rooms can be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "latentmotion"
ON_CPU = ["--cpu", "--use-pytorch-cross-attention"]
"""For a host without a GPU, where it would take another attention, slower and larger at the sizes of clips."""


def load_pack() -> ModuleType:
    """Import this checkout under the fixed package name `latentmotion`, whatever its folder is called."""
    if PACKAGE not in sys.modules:
        init = ROOT / "__init__.py"
        spec = importlib.util.spec_from_file_location(PACKAGE, init, submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return sys.modules[PACKAGE]


def load_host(path: Path, *arguments: str) -> None:
    """Put the ComfyUI at `path` on the import path, its command line set to `arguments`, without starting it."""
    if not (Path(path) / "comfy" / "model_patcher.py").is_file():
        raise FileNotFoundError(f"{path} is not a ComfyUI folder (no comfy/model_patcher.py in it)")
    if "comfy.cli_args" in sys.modules:
        return
    sys.path.insert(0, str(path))
    saved, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
        # The host's `nodes` puts comfy/ first on the path, where a `utils.py` would hide the host's `utils` package.
        importlib.import_module("utils.extra_config")
    finally:
        sys.argv = saved


def main(argv: list[str]) -> int | None:
    name, *rest = argv
    host = os.environ.get("COMFYUI_PATH")
    if host:
        device = [] if importlib.import_module("torch").cuda.is_available() else ON_CPU
        load_host(Path(host), *device)
    load_pack()
    return importlib.import_module(f"{PACKAGE}.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
