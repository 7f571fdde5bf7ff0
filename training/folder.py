"""A folder of videos and pictures with captions as a data set."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ..media.geometry import Frame
from ..media.read import read_clip
from ..media.shots import THRESHOLD, shots
from ..media.stills import read_still
from ..media.timing import Selection
from ..motion_modules.errors import TrainingError
from .dataset import Dataset, Film, some

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".wmv", ".ts")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILE_COLUMNS = ("file", "file_name", "filename", "video", "path", "videoid")
PARTS, PART = 16, 2**16  # of a file that tell it from others, in bytes
CAPTION_COLUMNS = ("caption", "text", "prompt", "name")


@dataclass(frozen=True)
class Reading:
    """How the files of a folder are read.

    caption: for files that have none. split: look for shots, where the colours differ by more than `threshold`.
    """

    selection: Selection = Selection()
    frame: Frame = Frame()
    caption: str = ""
    split: bool = False
    threshold: float = THRESHOLD


def media_files(folder: Path) -> list[Path]:
    """Videos and pictures in a folder and those below it, by name. Raises TrainingError where there are none."""
    if not folder.is_dir():
        raise TrainingError(f"There is no folder {folder}. Write the folder your videos are in.")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in VIDEOS + PICTURES and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        kinds = ", ".join(ending[1:] for ending in (*VIDEOS[:5], *PICTURES[:2]))
        raise TrainingError(f"There is no video in the folder {folder}. Put some there ({kinds} and others).")
    return files


def read_folder(folder: Path, how: Reading, on_file: Callable[[int, int], None] | None = None,
                on_frame: Callable[[int], None] | None = None) -> Dataset:  # fmt: skip
    """Every video of a folder with its caption; nothing is decoded yet, unless shots are looked for.

    A caption is the text file beside a video (a.txt for a.mp4), else its row in the folder's one CSV file, else
    `how.caption`. With shots, a text has a line for each of them, or one for all.
    Raises TrainingError or VideoError with a sentence for the user.
    """
    files = media_files(folder)
    texts = captions_of(folder, files, how.caption)
    films = []
    for number, path in enumerate(files):
        if on_file:
            on_file(number, len(files))
        films.append(_film(path, path.relative_to(folder).as_posix(), texts[path], how, on_frame))
    return Dataset(tuple(films))


def _film(path: Path, name: str, text: str, how: Reading, on_frame: Callable[[int], None] | None) -> Film:
    still = path.suffix.lower() in PICTURES
    clip = read_still(path, name, how.frame) if still else read_clip(path, name, how.selection, how.frame)
    mark = repr((_content(path), how.selection, how.frame))
    if still or not how.split:
        return Film(name, clip, (clip.frames,), (" ".join(text.split()),), mark=mark)
    parts = shots(clip, how.threshold, on_frame=on_frame)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) not in (1, len(parts)):
        raise TrainingError(
            f"{name} has {len(parts)} shot{'s' * (len(parts) != 1)} and {len(lines)} captions. Write one line for each "
            f"shot, or one for all. The shots begin at frame {some([str(sum(parts[:i])) for i in range(len(parts))])}."
        )
    return Film(name, clip, parts, tuple(lines * len(parts) if len(lines) == 1 else lines), found=True, mark=mark)


def _content(path: Path) -> str:
    """A short text that is another for another file: of its length and of parts all over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for part in range(PARTS):
            file.seek(max(0, size - PART) * part // (PARTS - 1))
            digest.update(file.read(PART))
    return digest.hexdigest()[:24]


def captions_of(folder: Path, files: list[Path], otherwise: str = "") -> dict[Path, str]:
    """The text of every file, not empty. Raises TrainingError naming the files that have none."""
    tables = sorted(path for path in folder.glob("*.csv") if not path.name.startswith("."))
    if len(tables) > 1:
        raise TrainingError(f"There are {len(tables)} CSV files in {folder}: {some([t.name for t in tables])}. Leave "
                            "the one that has the captions.")  # fmt: skip
    rows = _table(tables[0]) if tables else {}
    texts = {}
    for path in files:
        beside = path.with_suffix(".txt")
        name = path.relative_to(folder)
        keys = (name.as_posix(), name.with_suffix("").as_posix(), path.name, path.stem)
        listed = next((rows[key] for key in keys if key in rows), "")
        texts[path] = (_text(beside) if beside.is_file() else "").strip() or listed.strip() or otherwise.strip()
    bare = [path.relative_to(folder).as_posix() for path, text in texts.items() if not text]
    if bare:
        first = Path(bare[0]).with_suffix(".txt")
        raise TrainingError(
            f"{len(bare)} of the {len(files)} videos in {folder} {'has' if len(bare) == 1 else 'have'} no caption: "
            f"{some(bare)}. Write what each shows into a text file beside it ({first}) or into one CSV file with the "
            "columns file and caption, or set caption of Load Video Dataset (in a recipe, of its data) to one for all "
            "that have none."
        )
    return texts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path.name} cannot be read as text ({error}). Save it as UTF-8.") from error


def _table(path: Path) -> dict[str, str]:
    """File to caption: of the columns that are called so, or of the first two."""
    try:
        rows = [row for row in csv.reader(StringIO(_text(path), newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise TrainingError(f"{path.name} cannot be read as CSV ({error}).") from error
    if not rows or any(len(row) < 2 for row in rows):
        number = next((i for i, row in enumerate(rows, 1) if len(row) < 2), 1)
        raise TrainingError(f"{path.name}: row {number} has fewer than two columns. Write a file and its caption in "
                            "each row, separated by a comma, captions with commas in quotation marks.")  # fmt: skip
    names = [cell.strip().lower() for cell in rows[0]]
    file = next((names.index(name) for name in FILE_COLUMNS if name in names), None)
    caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
    if file is None or caption is None:
        file, caption = 0, 1
    else:
        rows = rows[1:]
    return {row[file].strip(): row[caption] for row in rows if len(row) > max(file, caption)}
