"""A host that lacks a part costs the nodes that need it, says so in one sentence, and keeps the others.

Each case imports the pack anew, under a name of its own as the host makes it from the folder, with a seam of the host
taken away meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
from pack import ROOT

FROZEN: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/host/schemas.json").read_text(encoding="utf-8"))
# What is taken from the host, and the nodes that must be left out for it: their ids and names on the canvas.
TRAVEL = {"LatentMotionPromptTravel": "Prompt Travel"}
DEMO = {"LatentMotionLoadDemoModels": "Load Demo Models"}
EDIT = {"LatentMotionDDIMInversion": "DDIM Inversion", "LatentMotionEvaluate": "Evaluate Video"}
APPLY = {"LatentMotionApplyMotionModule": "Apply Motion Module"}
SEAMS: dict[str, dict[str, str]] = {
    "comfy.hooks.TransformerOptionsHook": TRAVEL,  # from ... import
    "comfy.conds.CONDConstant": TRAVEL,
    "comfy.supported_models.SD15": DEMO,  # the base of a class, an AttributeError
    "comfy.sample": EDIT,  # a whole module
    "comfy_api.latest.io.Mask": APPLY,  # asked for by a schema
}
# Bugs of the pack at the end of nodes/travel.py.
BUGS: dict[str, tuple[str, type[Exception]]] = {
    "no module": ("from ..host import no_such_module", ImportError),
    "no file": ("from ..host.no_such_module import thing", ModuleNotFoundError),
    "no name": ("from ..host.travel import no_such_name", ImportError),
    "no attribute of a module": ("travel.no_such_name", AttributeError),
    "no attribute of a class": ("PromptTravel.no_such_name", AttributeError),
    "no attribute of None": ("None.no_such_name", AttributeError),
    "no attribute of a text": ("EXAMPLE.no_such_name", AttributeError),
    "no list of nodes": ("del NODES", AttributeError),
    "undefined": ("no_such_name", NameError),
    "syntax": ("def broken(:", SyntaxError),
}


class _Without:
    """A finder of modules that does not find one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@contextmanager
def lacking(seam: str) -> Iterator[str]:
    """The host without a module, or without a part of one; the name of the module that lacks it."""
    owner, name = resolve_name(seam.rpartition(".")[0]), seam.rpartition(".")[2]
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(resolve_name(seam), ModuleType):
            patch.delitem(sys.modules, seam)
            patch.setattr(sys, "meta_path", [_Without(seam), *sys.meta_path])
        patch.delattr(owner, name)
        yield owner.__name__


@pytest.fixture
def imported_anew() -> Iterator[Any]:
    """`imported_anew(folder)`: the nodes that a fresh import of the pack gives the host, by node id."""
    known = set(sys.modules)

    def nodes(folder: Path = ROOT) -> dict[str, type]:
        name = f"{folder}_anew".replace(".", "_x_")
        places = [str(folder)]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=places)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        async def node_list() -> list[type]:
            return await (await module.comfy_entrypoint()).get_node_list()

        return {node.GET_SCHEMA().node_id: node for node in asyncio.run(node_list())}

    yield nodes
    for name in [name for name in sys.modules if name not in known and "_anew" in name]:
        del sys.modules[name]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_whole_host_loses_nothing(imported_anew: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert set(imported_anew()) == set(FROZEN)
    assert not said(caplog)


@pytest.mark.parametrize("seam", SEAMS)
def test_missing_seam_costs_the_nodes_that_need_it(
    seam: str, imported_anew: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with lacking(seam) as owner:
        nodes = imported_anew()
        inputs = {node_id: [item.id for item in node.GET_SCHEMA().inputs] for node_id, node in nodes.items()}
    expected = {node_id: [item["id"] for item in node["inputs"]] for node_id, node in FROZEN.items()}
    assert inputs == {node_id: ids for node_id, ids in expected.items() if node_id not in SEAMS[seam]}
    (sentence,) = said(caplog)
    names = ", ".join(SEAMS[seam].values())
    assert sentence.startswith(f"LatentMotion leaves out {names}: ")
    assert owner in sentence and seam.rpartition(".")[2] in sentence
    assert sentence.endswith(f"The other {len(nodes)} nodes of the pack work.")


def test_shared_seam_leaves_what_does_not_need_it(imported_anew: Any, caplog: pytest.LogCaptureFixture) -> None:
    with lacking("comfy.context_windows"):
        nodes = imported_anew()
    windows = {"LatentMotionSlidingContext", "LatentMotionReuseAndDiffuse", "LatentMotionPromptTravel"}
    assert set(FROZEN) - nodes.keys() == windows | {"LatentMotionDDIMInversion", "LatentMotionEvaluate"}
    (sentence,) = said(caplog)
    assert "Sliding Context, Reuse and Diffuse" in sentence
    assert "No module named 'comfy.context_windows'" in sentence


def test_two_missing_seams_have_a_sentence_each(imported_anew: Any, caplog: pytest.LogCaptureFixture) -> None:
    with lacking("comfy.hooks.TransformerOptionsHook"), lacking("comfy.supported_models.SD15"):
        assert set(FROZEN) - set(imported_anew()) == {*TRAVEL, *DEMO}
    travel, demo = said(caplog)
    assert "Prompt Travel: " in travel and "TransformerOptionsHook" in travel and "Demo" not in travel
    assert "Load Demo Models: " in demo and "SD15" in demo


@pytest.mark.parametrize("bug", BUGS)
def test_bug_of_the_pack_is_raised(
    bug: str, tmp_path: Path, imported_anew: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for entry in ("__init__.py", "host", "motion_modules", "sampling", "training", "media", "demo"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    shutil.copytree(ROOT / "nodes", tmp_path / "nodes", ignore=shutil.ignore_patterns("__pycache__"))
    text, error = BUGS[bug]
    with (tmp_path / "nodes" / "travel.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    with pytest.raises(error):
        imported_anew(tmp_path)
    assert not said(caplog)
