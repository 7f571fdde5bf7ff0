"""A recipe file in place of a canvas: `run.py train RECIPE` fills in the nodes and runs them."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..host import recipe as files
from ..motion_modules.errors import check_choice
from .dataset import CameraMotionClips, LoadVideoDataset
from .train import TrainDomainAdapter, TrainMotionLora, TrainMotionModule

TRAININGS = {"motion lora": TrainMotionLora, "domain adapter": TrainDomainAdapter, "motion module": TrainMotionModule}
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


def carry_out(path: Path) -> None:
    """Run the training that a file describes. Raises ValueError with a sentence for whoever wrote it."""
    file = files.read_training_file(path)
    if file.training not in TRAININGS:
        known = ", ".join(TRAININGS)
        raise ValueError(f"{path.name} says training = {file.training!r}, and there are: {known}.")
    node = TRAININGS[file.training]
    folder = str(file.beside(str(file.data.get("folder", ""))))
    data = filled(LoadVideoDataset, file, "data") | {"folder": folder}
    camera, settings = filled(CameraMotionClips, file, "camera"), filled(node, file, "settings")
    with files.as_in_a_node():
        dataset = LoadVideoDataset.execute(**data).args[0]
        if file.camera:
            dataset = CameraMotionClips.execute(clips=dataset, **camera).args[0]
        wanted = {item.id: item.optional for item in node.GET_SCHEMA().inputs}
        sockets = files.load_models(file, with_motion=wanted.get("motion_module") is False)
        used = {name: value for name, value in sockets.items() if name in wanted}
        node.execute(**used, clips=dataset, **settings)


def filled(node: type[io.ComfyNode], file: files.TrainingFile, table: str) -> dict[str, Any]:
    """The widgets of a node: what the file's table says, else their defaults. Raises ValueError for what is none."""
    said = dict(getattr(file, table))
    widgets = [item for item in node.GET_SCHEMA().inputs if item.get_io_type() in WIDGETS]
    unknown = sorted(set(said) - {item.id for item in widgets})
    if unknown:
        raise ValueError(f"{file.path.name}: [{table}] has {unknown[0]}, which {node.GET_SCHEMA().display_name} has "
                         f"not. There are: {', '.join(item.id for item in widgets)}.")  # fmt: skip
    name = f"{file.path.name}: {{}}"
    return {item.id: _checked(item, said.get(item.id, item.default), name.format(item.id)) for item in widgets}


def _checked(item: io.Input, value: Any, name: str) -> Any:
    kind = item.get_io_type()
    if not isinstance(value, WIDGETS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise ValueError(f"{name} is {value!r}, where {kind.lower()} is needed.")
    least, most = getattr(item, "min", None), getattr(item, "max", None)
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name} is {value}, and must lie between {least} and {most}.")
    if kind == "COMBO":
        check_choice(name, value, item.options)
    return value


def main(argv: list[str]) -> int:
    """Carry out one recipe; Ctrl-C and SIGTERM keep the state of the training, from which the next run goes on."""
    with _heard() as log:
        if len(argv) != 1:
            log.error("Name one recipe: python3 scripts/run.py train RECIPE")
            return 2
        try:
            carry_out(Path(argv[0]))
        except (ValueError, FileNotFoundError) as error:
            log.error("Stopped: %s", error)
            return 1
        except KeyboardInterrupt:
            log.info("Stopped. What was learned is kept; the same command goes on with it.")
            return 130
        return 0


@contextmanager
def _heard() -> Iterator[logging.Logger]:
    """While the context lasts the pack's log is on the terminal, and SIGTERM is Ctrl-C."""
    log = logging.getLogger(__name__.split(".")[0])
    before, spoken = signal.signal(signal.SIGTERM, signal.default_int_handler), logging.StreamHandler(sys.stdout)
    level = log.level
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(spoken)
    try:
        yield log
    finally:
        log.removeHandler(spoken)
        log.setLevel(level)
        log.propagate = True
        signal.signal(signal.SIGTERM, before)
