"""A training written down in a file: what it says, and the models it names."""

from __future__ import annotations

import json
import math
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError

from ..motion_modules.animatediff.checkpoint import read_motion_module
from ..motion_modules.errors import TrainingError
from ..motion_modules.files import DAMAGE, read_weights
from ..training.loop import Stopped, fit
from . import demo_models, paths
from .memory import is_out_of_memory
from .motion import manage

DEMO = "demo"
TOGETHER = 2.0  # seconds; a closed terminal sends one signal itself and one through run.py
FOLDERS = ("checkpoints", "vae", "loras", "text_encoders", "diffusion_models", paths.MOTION_MODULES, paths.MOTION_LORAS)


@dataclass(frozen=True)
class TrainingFile:
    """What a recipe file says.

    checkpoint: file of the image model, or `demo`. models: a models folder to look names up in and write to.
    loras: LoRAs of the image model with their strengths. data, camera, settings: widgets of the nodes by name.
    """

    path: Path
    training: str
    checkpoint: str
    motion_module: str = ""
    vae: str = ""
    models: str = ""
    loras: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    camera: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def beside(self, name: str) -> Path:
        """A path as the file means it: relative to its own folder."""
        return self.path.parent / Path(name).expanduser()


def read_training_file(path: Path) -> TrainingFile:
    """Read a recipe, TOML or JSON. Raises TrainingError with a sentence for the person who wrote it."""
    if not path.is_file():
        raise TrainingError(f"There is no file {path}. Name a recipe: a TOML or JSON file.")
    try:
        said = _parsed(path)
    except ValueError as error:
        raise TrainingError(f"{path.name} cannot be read ({error}). Mend that line; strings need quotation marks."
                            ) from error  # fmt: skip
    known = [name for name in TrainingFile.__dataclass_fields__ if name != "path"]
    unknown = sorted(set(said) - set(known))
    if unknown:
        raise TrainingError(f"{path.name} says {unknown[0]}, which no recipe has. There are: {', '.join(known)}.")
    absent = [name for name in ("training", "checkpoint") if not said.get(name)]
    if absent:
        raise TrainingError(f'{path.name} does not say {" and ".join(absent)}. Add a line such as {absent[0]} = "...".')
    for name, value in said.items():
        kind = dict if name in ("loras", "data", "camera", "settings") else str
        if not isinstance(value, kind):
            raise TrainingError(f"{path.name}: {name} is {value!r}, where {'a table' if kind is dict else 'text'} is "
                                "needed.")  # fmt: skip
    for name, strength in said.get("loras", {}).items():
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
            raise TrainingError(f"{path.name}: {name} in [loras] is {strength!r}, where its strength is needed: 1.0 "
                                "for instance.")  # fmt: skip
    return TrainingFile(path.absolute(), **said)


def _parsed(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        said = json.loads(text)
    elif find_spec("tomllib"):
        said = import_module("tomllib").loads(text)
    else:
        raise TrainingError("This Python is older than 3.11 and reads no TOML. Write the recipe as JSON.")
    if not isinstance(said, dict):
        raise TrainingError(f"{path.name} holds a {type(said).__name__} where names with values are needed.")
    return said


@contextmanager
def as_in_a_node() -> Iterator[None]:
    """As the host's executor runs nodes."""
    with torch.inference_mode():
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """While the context lasts, Ctrl-C, SIGTERM and a closed terminal are Cancel where something learns, which keeps
    what was learned. A second one ends at once (KeyboardInterrupt), and so does the first where nothing learns.

    Raises Stopped where a training has kept its state.
    """
    asked: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[0] < TOGETHER:
            return
        asked.append(now)
        if len(asked) > 1 or not _learns(frame):
            raise KeyboardInterrupt
        comfy.model_management.interrupt_current_processing()

    ends = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    heard = [number for number in ends if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # not under nohup
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield
    except comfy.model_management.InterruptProcessingException as error:
        raise Stopped("The training was stopped, and its state is kept.") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        comfy.model_management.interrupt_current_processing(False)


def _learns(frame: FrameType | None) -> bool:
    """Whether the training loop is among the callers: it answers Cancel, between two steps at the latest."""
    while frame is not None and frame.f_code is not fit.__code__:
        frame = frame.f_back
    return frame is not None


def load_models(file: TrainingFile, with_motion: bool) -> dict[str, Any]:
    """The sockets `model`, `clip`, `vae` and, where it is named or needed, `motion_module`.

    Raises TrainingError, CheckpointError or ModelMismatchError where a file is missing or does not fit.
    """
    use_models(file)
    model, clip, vae = _image_model(file)
    for name, strength in file.loras.items():
        model, clip = _with_lora(model, clip, find(file, "loras", name), strength)
    sockets = {"model": model, "clip": clip, "vae": vae}
    if file.motion_module:
        path = find(file, paths.MOTION_MODULES, file.motion_module)
        sockets["motion_module"] = manage(read_motion_module(read_weights(path), path.name), path.name)
    elif with_motion:
        raise TrainingError(f"{file.path.name} names no motion module, and this training needs one. Add "
                            'motion_module = "mm_sd_v15_v2.ckpt", or whichever you have.')  # fmt: skip
    return sockets


def _image_model(file: TrainingFile) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, none of them without a network."""
    path = file.path
    if file.checkpoint == DEMO:
        model, clip, vae = demo_models.load_unet(), demo_models.load_clip(), demo_models.load_vae()
    else:
        path = find(file, "checkpoints", file.checkpoint)
        with _loading(path, "a checkpoint"):
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path))[:3]
    for part, what in ((model, "image model"), (clip, "text encoder")):
        if part is None:
            raise TrainingError(f"{path} holds no {what}, and a training needs one. Name a whole checkpoint.")
    if file.vae:
        path = find(file, "vae", file.vae)
        with _loading(path, "a VAE"):
            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path), safe_load=True))
    if getattr(vae, "first_stage_model", None) is None:
        raise TrainingError(f'{path} holds no VAE, and a training needs one. Name a file of one: vae = "...".')
    return model, clip, vae


def _with_lora(model: Any, clip: Any, path: Path, strength: float) -> tuple[Any, Any]:
    """MODEL and CLIP with a LoRA. Raises TrainingError where it is for neither of them."""
    with _loading(path, "a LoRA"):
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        changed = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)
    before, after = (sum(map(len, [*unet.patches.values(), *text.patcher.patches.values()]))
                     for unet, text in ((model, clip), changed))  # fmt: skip
    if after == before:
        raise TrainingError(f"{path} changes nothing: none of its tensors is for a layer of the image model or its "
                            "text encoder. Name a LoRA for this checkpoint, or leave it out.")  # fmt: skip
    return changed


@contextmanager
def _loading(path: Path, what: str) -> Iterator[None]:
    """While the host loads a file: raises TrainingError where it cannot."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, *DAMAGE) as error:
        if is_out_of_memory(error):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{path} cannot be loaded as {what} ({why}). Name another file, or get it again if it is "
                            "damaged.") from error  # fmt: skip


def use_models(file: TrainingFile) -> None:
    """Make the models folder of the recipe the first one the host looks into, and the one that is written to."""
    paths.register_folders()
    if not file.models:
        return
    root = file.beside(file.models)
    if not root.is_dir():
        raise TrainingError(f"{file.path.name} says models = {file.models}, and there is no folder {root}.")
    for name in FOLDERS:
        folder_paths.add_model_folder_path(name, str(root / name), is_default=True)


def find(file: TrainingFile, folder: str, name: str) -> Path:
    """A model by its path, or by its name in one of the host's folders. Raises TrainingError where it is neither."""
    beside = file.beside(name)
    if beside.is_file():
        return beside
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise TrainingError(f"{file.path.name} names {name}, which is neither a file beside it nor one of the "
                            f"{folder} folder: {', '.join(folder_paths.get_folder_paths(folder))}.")  # fmt: skip
    return Path(found)
