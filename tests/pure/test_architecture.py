"""The laws of the code base, read from its syntax trees: who imports whom, what runs at import, how long things are.

Each law is a function from a file to the sentences about what breaks it; each is also shown a small offence.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_FUNCTION, LONGEST_FILE, LONGEST_EXECUTE = 60, 400, 10

PURE = {"motion_modules", "sampling", "training", "media"}
MAY_IMPORT = {
    "": {"nodes"},
    "nodes": {"host", *PURE},
    "host": PURE,
    "training": {"motion_modules", "sampling", "media"},
    "motion_modules": set(),
    "sampling": set(),
    "media": set(),
    "demo": {"host", *PURE},
    "bench": {"demo", "host", *PURE},
}
# The loader of the demo models and their trainer build the same networks from one file of sizes.
EXCEPTIONS = {("host/demo_models.py", "demo.config")}
HOST_MODULES = {
    "app", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "comfyui_version", "execution",
    "folder_paths", "latent_preview", "main", "node_helpers", "nodes", "server", "utils",
}  # fmt: skip
MAY_IMPORT_HOST = {"host": HOST_MODULES, "nodes": {"comfy_api"}, "demo": HOST_MODULES, "bench": HOST_MODULES}
NEVER_IMPORTED = {"latentmotion", "scripts", "tests", *MAY_IMPORT} - {"", "nodes"}
# The host's documented tables for adding to, and the module each belongs to.
REGISTRIES = {"folder_paths.folder_names_and_paths": {"folder_paths"}}
# The second one answers which arithmetic a device it was given has; it moves and allocates nothing.
KNOW_DEVICES = {"host/memory.py", "training/precision.py"}
ORACLES = {"diffusers", "skvideo", "hypothesis", "pytest", "playwright"}
CALLS_AT_IMPORT = {
    "frozenset", "getattr", "hasattr", "io.Custom", "logging.getLogger", "partial", "re.compile", "replace", "tuple",
}  # fmt: skip
TENSOR_MATHS = {"permute", "rearrange", "einsum", "reshape", "transpose", "movedim", "unsqueeze", "view"}


@dataclass(frozen=True)
class Source:
    """One file of the pack: its path from the checkout, its room (the first folder; "" at the root), its tree."""

    path: str
    text: str

    @property
    def room(self) -> str:
        return self.path.split("/")[0] if "/" in self.path else ""

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def sources() -> list[Source]:
    """Every Python file of the pack, its demo, its measurements and its scripts; not the tests."""
    files = [file for room in [*MAY_IMPORT, "scripts"] if room for file in (ROOT / room).rglob("*.py")]
    return [Source(f.relative_to(ROOT).as_posix(), f.read_text("utf-8")) for f in [ROOT / "__init__.py", *files]]


def relative_imports(source: Source) -> Iterator[str]:
    """What relative imports name, as dotted paths from the checkout: `from ..demo import config` -> demo.config."""
    folder = source.path.split("/")[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)


def absolute_imports(source: Source) -> Iterator[str]:
    """The modules that absolute imports name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def rooms_are_layered(source: Source) -> Iterator[str]:
    """Imports between rooms point one way."""
    for name in relative_imports(source):
        room = name.split(".")[0]
        allowed = room in {source.room, *MAY_IMPORT[source.room]} or any(
            source.path == path and name.startswith(target) for path, target in EXCEPTIONS
        )
        if not allowed:
            yield f"imports {name}: {source.room or 'the root'} may import {sorted(MAY_IMPORT[source.room])} only"


def host_is_imported_in_host_only(source: Source) -> Iterator[str]:
    """Only host/ knows ComfyUI's modules, nodes/ its node API, demo/ and bench/ (never loaded by it) what they need."""
    for name in absolute_imports(source):
        module = name.split(".")[0]
        if module in HOST_MODULES and module not in MAY_IMPORT_HOST.get(source.room, set()):
            yield f"imports the host's {name}"


def own_rooms_are_imported_relatively(source: Source) -> Iterator[str]:
    """The host loads a pack under a name made of its folder, so an absolute import would find something else."""
    names = absolute_imports(source)
    yield from (f"imports {name} absolutely" for name in names if name.split(".")[0] in NEVER_IMPORTED)


def tools_of_tests_stay_there(source: Source) -> Iterator[str]:
    """What only developers install is imported by tests and measurements only."""
    if source.room != "bench":
        yield from (f"imports {name}" for name in absolute_imports(source) if name.split(".")[0] in ORACLES)


def _works(value: ast.AST) -> Iterator[str]:
    """Calls in a module-level value, except of classes, of the file's own private helpers and inside lambdas."""
    if isinstance(value, ast.Lambda):
        return
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        if called not in CALLS_AT_IMPORT and not called.lstrip("_")[:1].isupper() and called[0] != "_":
            yield f"line {value.lineno} calls {called} at import"
    for child in ast.iter_child_nodes(value):
        yield from _works(child)


def nothing_works_at_import(source: Source) -> Iterator[str]:
    """At module level: imports, definitions and constants. A constant may be built by a class, not by a function."""
    for node in source.tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            state = [name.id for name in names if isinstance(node.value, (ast.List, ast.Dict, ast.Set))
                     and not name.id.isupper() and not name.id.startswith("__")]  # fmt: skip
            yield from (f"line {node.lineno}: {name} is mutable module state" for name in state)
            yield from _works(node.value or ast.Constant(None))
        else:
            yield f"line {node.lineno} does something at import: {ast.unparse(node)[:60]}"


def globals_are_left_alone(source: Source) -> Iterator[str]:
    """No `global`, and nothing is assigned to a part of something imported (monkey-patching)."""
    imported = {alias.asname or alias.name.split(".")[0] for node in ast.walk(source.tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}  # fmt: skip
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno} uses global"
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "", ast.Store())]
        for target in targets:
            base = target
            while isinstance(base, (ast.Attribute, ast.Subscript)):
                base = base.value
            written = ast.unparse(target).split("[")[0]
            foreign = imported - REGISTRIES.get(written, set())
            if base is not target and isinstance(base, ast.Name) and base.id in foreign:
                yield f"line {node.lineno} writes to {ast.unparse(target)}, which is not ours"


def devices_are_the_hosts_business(source: Source) -> Iterator[str]:
    """No torch.cuda and no autocast outside host/memory.py: a CPU, a Mac or an AMD card must not need luck."""
    if source.path in KNOW_DEVICES or source.room in ("demo", "bench"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and (ast.unparse(node) == "torch.cuda" or node.attr == "autocast"):
            yield f"line {node.lineno} uses {ast.unparse(node)}"


def nodes_are_thin(source: Source) -> Iterator[str]:
    """A node is its schema and one call: a short `execute`, no tensor maths, no torch call."""
    if source.room != "nodes":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.split(".")[0] == "torch" or called.split(".")[-1] in TENSOR_MATHS:
                yield f"line {node.lineno} does tensor maths: {called}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == "execute":
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1
            if length > LONGEST_EXECUTE:
                yield f"line {node.lineno}: execute has {length} lines, {LONGEST_EXECUTE} at most"


def things_are_short(source: Source) -> Iterator[str]:
    """A function is at most 60 lines, a file at most 400."""
    lines = len(source.text.splitlines())
    if lines > LONGEST_FILE:
        yield f"has {lines} lines, {LONGEST_FILE} at most"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"line {node.lineno}: {node.name} has {length} lines, {LONGEST_FUNCTION} at most"


Law = Callable[[Source], Iterator[str]]
SCRIPTS_TOO: list[Law] = [things_are_short]
ROOMS_ONLY: list[Law] = [
    rooms_are_layered,
    host_is_imported_in_host_only,
    own_rooms_are_imported_relatively,
    tools_of_tests_stay_there,
    nothing_works_at_import,
    globals_are_left_alone,
    devices_are_the_hosts_business,
    nodes_are_thin,
]
# One offence against each law: the file it would stand in, and its text.
OFFENCES: list[tuple[Law, str, str]] = [
    (rooms_are_layered, "sampling/a.py", "from ..host import inflate"),
    (rooms_are_layered, "motion_modules/animatediff/a.py", "from ...nodes.motion import X"),
    (rooms_are_layered, "host/a.py", "from ..demo import config"),
    (host_is_imported_in_host_only, "training/a.py", "def f():\n    import comfy.utils"),
    (host_is_imported_in_host_only, "nodes/a.py", "import folder_paths"),
    (host_is_imported_in_host_only, "media/a.py", "from nodes import NODE_CLASS_MAPPINGS"),
    (own_rooms_are_imported_relatively, "host/a.py", "from motion_modules import call"),
    (own_rooms_are_imported_relatively, "bench/a.py", "import latentmotion.host"),
    (tools_of_tests_stay_there, "host/a.py", "from diffusers import UNetMotionModel"),
    (nothing_works_at_import, "host/a.py", "CUDA = torch.cuda.is_available()"),
    (nothing_works_at_import, "host/a.py", "folder_paths.add_model_folder_path('x', 'y')"),
    (nothing_works_at_import, "host/a.py", "for x in y:\n    pass"),
    (nothing_works_at_import, "host/a.py", "cache = {}"),
    (globals_are_left_alone, "host/a.py", "def f():\n    global x\n    x = 1"),
    (globals_are_left_alone, "host/a.py", "import comfy.samplers\ncomfy.samplers.sample = None"),
    (globals_are_left_alone, "host/a.py", "from torch.nn import GroupNorm\nsetattr(GroupNorm, 'forward', None)"),
    (devices_are_the_hosts_business, "host/a.py", "def f():\n    torch.cuda.empty_cache()"),
    (nodes_are_thin, "nodes/a.py", "def f(x):\n    return x.permute(0, 1)"),
    (nodes_are_thin, "nodes/a.py", "class X:\n    def execute(cls):\n" + "        x = 1\n" * 11),
    (things_are_short, "host/a.py", "def f():\n" + "    x = 1\n" * 60),
    (things_are_short, "host/a.py", "X = 1\n" * 401),
]


@pytest.mark.parametrize("law", [*ROOMS_ONLY, *SCRIPTS_TOO], ids=lambda law: law.__name__)
def test_law_holds(law: Law) -> None:
    applies = [source for source in sources() if source.room != "scripts" or law in SCRIPTS_TOO]
    broken = [f"{source.path} {offence}" for source in applies for offence in law(source)]
    assert not broken, f"{law.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize(("law", "path", "text"), OFFENCES, ids=lambda value: getattr(value, "__name__", None))
def test_law_can_be_broken(law: Law, path: str, text: str) -> None:
    assert list(law(Source(path, text)))


def test_every_law_is_shown_an_offence() -> None:
    assert {law for law, _, _ in OFFENCES} == {*ROOMS_ONLY, *SCRIPTS_TOO}


def test_all_rooms_are_read() -> None:
    assert {source.room for source in sources()} >= {"", "nodes", "host", "motion_modules", "sampling", "scripts"}
