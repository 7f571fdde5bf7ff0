"""What a node shows of itself is complete, and what saved workflows rely on is frozen in `schemas.json`.

That file is written by hand: a node that is new, or an input that was appended, is added to it; what is there stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io

HERE = Path(__file__).resolve().parent
FROZEN: dict[str, dict[str, Any]] = json.loads((HERE / "schemas.json").read_text(encoding="utf-8"))
HELP = HERE.parent.parent / "js" / "docs"
# Read from folders, so the list is the user's own.
FILES = {"motion_module", "motion_lora", "tuned_model", "vae_name", "video_file"}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def described(node: type) -> dict[str, Any]:
    """A node in the form of schemas.json, from the schema the host reads."""
    schema = node.GET_SCHEMA()
    return {
        "inputs": [_input(item) for item in schema.inputs],
        "outputs": [output.get_io_type() for output in schema.outputs],
    }


def _input(item: io.Input) -> dict[str, Any]:
    found: dict[str, Any] = {"id": item.id, "type": item.get_io_type()}
    if item.optional:
        found["optional"] = True
    if getattr(item, "options", None) is not None and item.id not in FILES:
        found["options"] = list(item.options)
    return found


def appended_only(frozen: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What would break a saved workflow: things that were frozen and are gone, changed or moved."""
    broken = []
    for place, old in enumerate(frozen["inputs"]):
        new = now["inputs"][place] if place < len(now["inputs"]) else {}
        plain = {key: value for key, value in old.items() if key != "options"}
        if plain != {key: value for key, value in new.items() if key != "options"}:
            broken.append(f"input {place} was {plain} and is {new or 'gone'}")
        lost = [option for option in old.get("options", []) if option not in new.get("options", [])]
        broken += [f"{old['id']} has lost its option {option!r}" for option in lost]
    required = [item["id"] for item in now["inputs"][len(frozen["inputs"]):]
                if not item.get("optional") and item["type"] not in WIDGETS]  # fmt: skip
    broken += [f"the new socket {name} must be optional, since old workflows do not connect it" for name in required]
    if now["outputs"][:len(frozen["outputs"])] != frozen["outputs"]:
        broken.append(f"outputs were {frozen['outputs']} and are {now['outputs']}")
    return broken


@pytest.fixture(params=sorted(FROZEN))
def node_id(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_node_is_frozen(pack_nodes: dict[str, type]) -> None:
    assert sorted(pack_nodes) == sorted(FROZEN), "add new nodes to tests/host/schemas.json; never remove one"


def test_saved_workflows_still_fit(node_id: str, pack_nodes: dict[str, type]) -> None:
    now = described(pack_nodes[node_id])
    broken = appended_only(FROZEN[node_id], now)
    assert not broken, "\n".join(broken)
    assert now == FROZEN[node_id], "append what is new to tests/host/schemas.json"


@pytest.mark.parametrize("change", [
    lambda node: node["inputs"].insert(0, {"id": "new", "type": "FLOAT"}),
    lambda node: node["inputs"].pop(),
    lambda node: node["inputs"].reverse(),
    lambda node: node["inputs"].append({"id": "new", "type": "MODEL"}),
    lambda node: node["inputs"][1].update(type="STRING"),
    lambda node: node["inputs"][6]["options"].pop(),
    lambda node: node["outputs"].clear(),
])  # fmt: skip
def test_a_breaking_change_is_noticed(change: Any) -> None:
    frozen = FROZEN["LatentMotionApplyMotionModule"]
    now = json.loads(json.dumps(frozen))
    assert not appended_only(frozen, now)
    change(now)
    assert appended_only(frozen, now)


def test_schema_is_valid_and_described(node_id: str, pack_nodes: dict[str, type]) -> None:
    schema = pack_nodes[node_id].GET_SCHEMA()
    assert schema.node_id == node_id and re.fullmatch(r"LatentMotion[A-Z]\w+", node_id)
    assert re.fullmatch(r"latent motion(/[a-z ]+){1,2}", schema.category), schema.category
    assert schema.display_name and schema.display_name.isascii()
    assert schema.description and schema.description.endswith(".")


def test_inputs_and_outputs_are_explained(node_id: str, pack_nodes: dict[str, type]) -> None:
    schema = pack_nodes[node_id].GET_SCHEMA()
    for item in schema.inputs:
        assert item.tooltip and item.tooltip.endswith("."), f"{item.id} has no tooltip that is a sentence"
        widget = item.get_io_type() in WIDGETS and item.id not in FILES
        assert not widget or item.default is not None, f"{item.id} has no default"
    for output in schema.outputs:
        assert output.tooltip and output.tooltip.endswith("."), f"an output has no tooltip that is a sentence: {output}"
        assert output.display_name, "an output has no name"


def test_help_page_covers_the_node(node_id: str, pack_nodes: dict[str, type]) -> None:
    schema = pack_nodes[node_id].GET_SCHEMA()
    page = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    rows = {name.strip() for line in page.splitlines() if line.startswith("| ")
            for name in line.split("|")[1].split(",")}  # fmt: skip
    rows |= set(re.findall(r"^- \*\*(\w+)\*\*", page, re.MULTILINE))
    names = [item.id for item in schema.inputs] + [output.display_name for output in schema.outputs]
    missing = [name for name in names if name not in rows]
    assert not missing, f"the help page has no row or item for {missing}"


def test_no_help_page_is_left_over(pack_nodes: dict[str, type]) -> None:
    assert {path.stem for path in HELP.glob("*.md")} == set(pack_nodes)
