"""Errors of reading and writing video, as sentences for the person at the canvas."""

from __future__ import annotations

import errno
from pathlib import Path


class VideoError(ValueError):
    """A video cannot be read, or cannot be written as asked; the message says why and what to do."""


FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
ABSENT = {errno.ENOENT, errno.ENOTDIR}


def write_failure(path: Path, error: Exception) -> VideoError:
    """The sentence for an error of the operating system or of ffmpeg while `path` was written."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if number in FULL:
        text = f"There is no room left for {path}. Free some space on that disk, or lower the quality, and queue again."
    elif number == errno.EFBIG:
        text = (
            f"{path} grew larger than that disk or this account allows for one file. "
            "Lower the quality, save fewer frames, or save to another disk."
        )
    elif number in FORBIDDEN:
        text = f"ComfyUI is not allowed to write {path}. Choose another folder, or change the permissions of this one."
    elif number in ABSENT:
        text = f"{path} cannot be written, because the folder {path.parent} does not exist. Choose another folder."
    else:
        text = f"{path} could not be written: {reason}."
    return VideoError(f"{text} Nothing half-written was left, and what was sampled before is still there.")
