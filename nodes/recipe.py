"""A recipe file in place of a canvas: `run.py train RECIPE` fills in the nodes and runs them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..host import recipe as files
from ..host.video import known_video
from .checked import check_widget
from .dataset import CameraMotionClips, LoadVideoDataset
from .train import TrainDomainAdapter, TrainMotionLora, TrainMotionModule
from .tune import TuneVideoModel
from .video import LoadVideo

TUNING = "video model"
TRAININGS = {"motion lora": TrainMotionLora, "domain adapter": TrainDomainAdapter, "motion module": TrainMotionModule,
             TUNING: TuneVideoModel}  # fmt: skip
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


def carry_out(path: Path) -> None:
    """Run the training that a file describes. Raises ValueError with a sentence for whoever wrote it."""
    file = files.read_training_file(path)
    if file.training not in TRAININGS:
        known = ", ".join(TRAININGS)
        raise ValueError(f"{path.name} says training = {file.training!r}, and there are: {known}.")
    node = TRAININGS[file.training]
    settings = filled(node, file, "settings")
    if file.training == TUNING:
        settings |= {"base_name": Path(file.checkpoint).name}
    made = _video_of(file) if file.training == TUNING else _dataset_of(file)
    with files.as_in_a_node():
        clips = {name: make() for name, make in made.items()}
        wanted = {item.id: item.optional for item in node.GET_SCHEMA().inputs}
        sockets = files.load_models(file, with_motion=wanted.get("motion_module") is False)
        used = {name: value for name, value in sockets.items() if name in wanted}
        node.execute(**used, **clips, **settings)


Made = dict[str, Callable[[], Any]]
"""A socket of the training, and what makes its value."""


def _dataset_of(file: files.TrainingFile) -> Made:
    folder = str(file.beside(str(file.data.get("folder", ""))))
    data, camera = filled(LoadVideoDataset, file, "data", folder=folder), filled(CameraMotionClips, file, "camera")

    def make() -> Any:
        dataset = LoadVideoDataset.execute(**data).args[0]
        return CameraMotionClips.execute(clips=dataset, **camera).args[0] if file.camera else dataset

    return {"clips": make}


def _video_of(file: files.TrainingFile) -> Made:
    """The video that [data] names under `video_file`, by its path or as one of the input folder."""
    if file.camera:
        raise ValueError(f"{file.path.name} has a [camera], and a video model learns one video as it is. Leave it out.")
    name = str(file.data.get("video_file", ""))
    path = file.beside(name)
    if not path.is_file() and (not name or known_video(name) is not True):
        raise ValueError(f"{file.path.name}: video_file in [data] is {name!r}, and there is no file {path}.")
    data = filled(LoadVideo, file, "data", video_file=path if path.is_file() else name)
    return {"video": lambda: LoadVideo.execute(**data).args[0]}


def filled(node: type[io.ComfyNode], file: files.TrainingFile, table: str, **known: Any) -> dict[str, Any]:
    """The widgets of a node: those known already, else what the file's table says, else their defaults.

    Raises ValueError for what is none of them or has no such value.
    """
    said = dict(getattr(file, table))
    widgets = [item for item in node.GET_SCHEMA().inputs if item.get_io_type() in WIDGETS]
    unknown = sorted(set(said) - {item.id for item in widgets})
    if unknown:
        raise ValueError(f"{file.path.name}: [{table}] has {unknown[0]}, which {node.GET_SCHEMA().display_name} does "
                         f"not have. There are: {', '.join(item.id for item in widgets)}.")  # fmt: skip
    name = f"{file.path.name}: {{}}"
    return known | {item.id: _checked(item, said.get(item.id, item.default), name.format(item.id))
                    for item in widgets if item.id not in known}  # fmt: skip


def _checked(item: io.Input, value: Any, name: str) -> Any:
    kind = item.get_io_type()
    if not isinstance(value, WIDGETS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise ValueError(f"{name} is {value!r}, where {kind.lower()} is needed.")
    check_widget(item, value, name)
    return value


def main(argv: list[str]) -> int:
    """Carry out one recipe; Ctrl-C keeps the state of the training, from which the next run goes on."""
    with _heard() as log:
        if len(argv) != 1:
            log.error("Name one recipe: python3 scripts/run.py train RECIPE")
            return 2
        try:
            with files.stoppable():
                carry_out(Path(argv[0]))
        except (ValueError, FileNotFoundError) as error:
            log.error("Stopped: %s", error)
            return 1
        except files.Stopped:
            log.info("Stopped. What was learned is kept; the same command goes on with it.")
            return 130
        except KeyboardInterrupt:
            log.info("Stopped at once. The same command goes on from the last state on the disk, or begins where there "
                     "is none.")  # fmt: skip
            return 130
        return 0


@contextmanager
def _heard() -> Iterator[logging.Logger]:
    """While the context lasts the pack's log is on the terminal."""
    log = logging.getLogger(__name__.split(".")[0])
    spoken = logging.StreamHandler(sys.stdout)
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
