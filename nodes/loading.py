"""The start-up self-check: what a host lacks costs the nodes that need it and no others, and the log says so.

Files of nodes are imported one by one, and each node's schema is asked for, as the host will. What goes wrong there is
told apart by who lacks the name that was looked for, not by where the search began:

- An ImportError or AttributeError about anything outside of this pack (a module of ComfyUI that moved, a function that
  was renamed, a Python package that is not installed) leaves out the nodes that could not do without it.
- The same errors about a module of this pack, and every other kind of error (SyntaxError, NameError, ...), are bugs of
  the pack. They are raised, so the host reports the pack as failed.

A name of the host that the pack misspells looks like one that the host has lost; it is named in the log, and the tests
ask for every node on hosts that are known to have all of them. Names that a node looks up only while it runs are not
asked for here: without them that node fails when it runs, and the others work.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from comfy_api.latest import io

log = logging.getLogger(__name__)

Lacking = dict[str, list[str]]
"""What is missing, in Python's words, and the display names of what is left out for it."""


def load_nodes(files: Iterable[str], lacking: Lacking) -> list[type[io.ComfyNode]]:
    """The nodes of these files of `nodes/` that work on this host; the others are added to `lacking`."""
    working: list[type[io.ComfyNode]] = []
    for file in files:
        names, nodes = _display_names(file), []
        with needed_by(names.values(), lacking):
            nodes = import_module(f".{file}", __package__).NODES
        for node in nodes:
            with needed_by([names.get(node.__name__, node.__name__)], lacking):
                node.GET_SCHEMA()
                working.append(node)
    return working


@contextmanager
def needed_by(names: Iterable[str], lacking: Lacking) -> Iterator[None]:
    """Note in `lacking` what the body misses outside of this pack, and go on; raise what is a bug of the pack."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        if _is_ours(error):
            raise
        lacking.setdefault(str(error), []).extend(names)


def report(lacking: Lacking, working: int) -> None:
    """One sentence in the log for each thing that is missing. working: how many nodes are there."""
    for what, names in lacking.items():
        log.warning(
            "LatentMotion leaves out %s: this ComfyUI, or the Python it runs on, lacks a part that is needed there "
            "(%s). The other %d nodes of the pack work.", ", ".join(names), what, working,
        )  # fmt: skip


def _is_ours(error: ImportError | AttributeError) -> bool:
    """Whether the name that was not found was looked for in this pack.

    Errors that do not say where they looked, or that looked in None, a string and the like, belong to the module that
    raised them.
    """
    if isinstance(error, ImportError):
        owner = error.name
    else:
        owner = error.obj.__name__ if isinstance(error.obj, ModuleType) else getattr(error.obj, "__module__", None)
    if owner in (None, "builtins"):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        owner = frame.f_globals["__name__"]
    pack = __name__.rsplit(".", 2)[0]
    return owner == pack or owner.startswith(f"{pack}.")


def _display_names(file: str) -> dict[str, str]:
    """The names on the canvas of a file's nodes, by class. Read from its text: without an import there is no schema."""
    text = Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^class (\w+)\(Node\):.*?display_name="([^"]+)"', text, re.MULTILINE | re.DOTALL))
