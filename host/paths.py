"""Where model files live: the folders AnimateDiff users already have, and the pack's own demo weights."""

from __future__ import annotations

import difflib
from pathlib import Path

import folder_paths

from ..motion_modules.animatediff.checkpoint import refuse_other_files, unwrap
from ..motion_modules.errors import CheckpointError
from ..motion_modules.files import read_outline
from ..motion_modules.temporal_vae.checkpoint import is_temporal
from ..motion_modules.tune_a_video.checkpoint import refuse_other_files as refuse_untuned

MOTION_MODULES = "animatediff_models"
MOTION_LORAS = "animatediff_motion_lora"
VAES = "vae"
TUNED = "tuned video model"
LONGEST_NAME = 200  # bytes; file systems take 255, and a training's state has a longer name
DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"


def register_folders() -> None:
    """Make the motion folders known to the host; paths that the user or another pack has set stay first."""
    for name in (MOTION_MODULES, MOTION_LORAS):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        folders, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, extensions or folder_paths.supported_pt_extensions)
    for name in (MOTION_MODULES, MOTION_LORAS, "loras", "controlnet"):
        if (DEMO_WEIGHTS / name).is_dir():
            folder_paths.add_model_folder_path(name, str(DEMO_WEIGHTS / name))


def list_files(folder: str) -> list[str]:
    """Names the user can choose from."""
    return folder_paths.get_filename_list(folder)


def locate(folder: str, name: str) -> Path:
    """Full path of a chosen file. Raises CheckpointError naming files that would fit when it is not there."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise CheckpointError(missing_file(folder, name))
    return Path(path)


def state_of(folder: str, name: str | None) -> object:
    """What changes when a chosen file does; a name that is linked is known only when the node runs."""
    path = name and folder_paths.get_full_path(folder, name)
    if not path:
        return name
    found = Path(path).stat()
    return name, found.st_mtime_ns, found.st_size


def new_file(folder: str, name: str) -> Path:
    """Where a file of this name is to be written: the user's first folder of the kind that is in no custom node pack,
    as it would go when that is removed.

    Raises CheckpointError for a name that is none, or that leads out of that folder.
    """
    folders = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    packs = [Path(path) for path in folder_paths.get_folder_paths("custom_nodes")]
    root = next((path for path in folders if not any(path.is_relative_to(pack) for pack in packs)), folders[0])
    stem = name.strip().removesuffix(".safetensors")
    odd = not stem.isprintable() or any(len(part.encode()) > LONGEST_NAME for part in stem.split("/"))
    path = (root / f"{'' if odd else stem}.safetensors").resolve()
    if odd or not stem or not path.is_relative_to(root.resolve()) or path.name.startswith("."):
        raise CheckpointError(f"'{name}' is no name for a file in {root}. Write one such as zoom_in or pans/left.")
    return path


def missing_file(folder: str, name: str, kind: str = "") -> str:
    """The sentence for a shared workflow that names a file this user lacks. kind: TUNED for those among modules."""
    kind = kind or {MOTION_MODULES: "motion module", MOTION_LORAS: "MotionLoRA", VAES: "temporal VAE"}[folder]
    fitting = [candidate for candidate in list_files(folder) if _fits(folder, candidate, kind)]
    if not fitting:
        return (f"The {kind} {name} is not in your {folder} folder, and neither is any other{_but_ours(folder)}. Put "
                f"one into {Path(folder_paths.models_dir) / folder} and refresh the page.")
    closest = difflib.get_close_matches(name, fitting, n=5, cutoff=0.0)
    return (f"The {kind} {name} is not in your {folder} folder. Of the files you have, these would fit: "
            f"{', '.join(closest)}.")


def _but_ours(folder: str) -> str:
    listed = (Path(folder_paths.get_full_path(folder, name) or name) for name in list_files(folder))
    return " but the demo's" if any(path.is_relative_to(DEMO_WEIGHTS) for path in listed) else ""


def _fits(folder: str, name: str, kind: str = "") -> bool:
    """Whether a file is of the right kind, as far as its header tells; pickles have none and count as fitting. The
    demo's fit no checkpoint that anyone has."""
    path = Path(folder_paths.get_full_path(folder, name) or name)
    if path.is_relative_to(DEMO_WEIGHTS):
        return False
    if path.suffix not in (".safetensors", ".sft"):
        return True
    try:
        outline = read_outline(path)
        if kind == TUNED:
            refuse_untuned(unwrap(outline), name)
        elif folder == MOTION_MODULES:
            refuse_other_files(unwrap(outline), name)
        if folder == VAES:
            return is_temporal(outline)
        return folder == MOTION_MODULES or any("motion_modules." in key and "lora" in key for key in outline)
    except CheckpointError:
        return False
