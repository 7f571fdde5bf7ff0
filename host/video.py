"""VIDEO objects that make their frames while they are saved, and the nodes' way to files in and out."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import Input, InputImpl, Types, io, ui
from torch import Tensor

from ..media import formats
from ..media.clip import Clip, Sound, clip_of_images, collect_pictures, collect_sound, part_of_clip, sound_of_samples
from ..media.errors import VideoError
from ..media.geometry import Fit, Frame
from ..media.read import read_clip
from ..media.timing import LARGEST_DENOMINATOR, Selection
from ..media.write import Writing, write, write_film

SHOWN_PICTURES = 16
FITS = [fit.value for fit in Fit]
FORMATS = [form.value for form in formats.Format]
CONTAINERS = {"mp4": formats.MP4, "mkv": formats.MKV, "webm": formats.WEBM}
CODECS = {"h264": formats.H264, "av1": formats.AV1}
DEMO_CLIPS = Path(__file__).resolve().parent.parent / "demo" / "clips"


class StreamedVideo(Input.Video):
    """A VIDEO over a clip: length, size and rate are known, pictures are made while something saves or collects them.

    Nothing of a picture is kept, so each save makes them again, and one that fails loses nothing.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def get_components(self) -> Types.VideoComponents:
        """Every picture at once, as IMAGE has them."""
        images = collect_pictures(self.clip, watch(self.clip))
        sound = self.clip.sound
        audio = sound and {"waveform": collect_sound(sound)[None], "sample_rate": sound.rate}
        return Types.VideoComponents(images=images, audio=audio, frame_rate=self.clip.frame_rate)

    def save_to(
        self,
        path: str | BytesIO,
        format: Any = "auto",
        codec: Any = "auto",
        metadata: dict | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
        color_space: str | None = None,
    ) -> None:
        """Write a film while its frames are made, as the host's Save Video asks for it.

        Raises VideoError where the file cannot be written; then nothing is left of it.
        """
        if color_space not in (None, "auto", "sRGB"):
            raise VideoError(f"This video has sRGB colours and cannot be saved as {color_space}. Choose auto or sRGB.")
        target = path if hasattr(path, "write") else Path(path)
        container, compression = film_of(format, codec, target)
        least = 1.0 if compression is formats.AV1 else 0.0
        how = Writing(
            quality=formats.DEFAULT_QUALITY,
            metadata=metadata or {},
            on_frame=watch(self.clip),
            ten_bit=(bit_depth or 8) > 8,
            crf=crf if crf is None else max(least, crf),
        )
        write_film(self.clip, target, container, compression, how)

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = False
    ) -> StreamedVideo | None:
        """The part from `start_time` (below 0: from the end) for `duration` seconds (0: all); still not made.

        None where nothing would be left, or less than `duration` although it is strict.
        """
        start, frames = _window(self.clip, start_time or 0.0, duration or 0.0)
        if frames <= 0 or (strict_duration and duration and frames < round(duration * self.clip.frame_rate)):
            return None
        return StreamedVideo(part_of_clip(self.clip, start, frames))

    def get_dimensions(self) -> tuple[int, int]:
        return self.clip.width, self.clip.height

    def get_duration(self) -> float:
        return float(self.clip.seconds)

    def get_frame_count(self) -> int:
        return self.clip.frames

    def get_frame_rate(self) -> Fraction:
        return self.clip.frame_rate

    def get_container_format(self) -> str:
        return formats.MP4.name

    def get_bit_depth(self) -> int:
        return 8

    def get_color_space(self) -> str:
        return "sRGB"


def watch(clip: Clip) -> Callable[[int], None]:
    """What to call after each frame: shows progress, and raises the host's interrupt when Cancel was pressed."""
    bar, step = comfy.utils.ProgressBar(clip.frames), max(1, clip.frames // 100)

    def on_frame(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not clip.shows_progress and (done - bar.current >= step or done == clip.frames):
            bar.update_absolute(done, clip.frames)

    return on_frame


def film_of(format: Any, codec: Any, target: Path | BytesIO) -> tuple[formats.Container, formats.Codec]:
    """Container and codec for what the host's Save Video names; auto goes by the file's ending. Raises VideoError."""
    asked, compression = (str(getattr(name, "value", name)) for name in (format, codec))
    if asked == "auto":
        asked = target.suffix[1:].lower() if isinstance(target, Path) and target.suffix[1:] in CONTAINERS else "mp4"
    if compression == "auto":
        compression = "av1" if asked == "webm" else "h264"
    if asked not in CONTAINERS or compression not in CODECS or (asked, compression) == ("webm", "h264"):
        raise VideoError(
            f"{compression} in {asked} cannot be written. Choose format and codec auto, or Save Video "
            "(Formats), which has webm, webp and png."
        )
    return CONTAINERS[asked], CODECS[compression]


def clip_of(video: Input.Video | Tensor) -> Clip:
    """Any VIDEO, or an IMAGE at a frame a second, as a clip. Files stay on disk, what is in memory is not copied."""
    if isinstance(video, Tensor):
        return clip_of_images(video, Fraction(1))
    if isinstance(video, StreamedVideo):
        return video.clip
    if isinstance(video, InputImpl.VideoFromFile):
        source = video.get_stream_source()
        name = "The video" if isinstance(source, BytesIO) else os.path.basename(source)
        clip = read_clip(source, name, Selection(), Frame())
        window = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
        return part_of_clip(clip, *_window(clip, *window)) if any(window) else clip
    components = video.get_components()
    rate = Fraction(components.frame_rate).limit_denominator(LARGEST_DENOMINATOR)  # the host makes it of a decimal
    return clip_of_images(components.images, rate, sound_of(components.audio))


def sound_of(audio: dict[str, Any] | None) -> Sound | None:
    """An AUDIO as the sound of a clip; of several in one batch the first."""
    return audio and sound_of_samples(audio["waveform"][0], int(audio["sample_rate"]))


def _window(clip: Clip, start: float, seconds: float) -> tuple[int, int]:
    """First frame and number of frames of a part; start below 0 counts from the end, seconds 0 means all."""
    first = max(0, round((start if start >= 0 else float(clip.seconds) + start) * clip.frame_rate))
    rest = max(0, clip.frames - first)
    return first, min(rest, round(seconds * clip.frame_rate)) if seconds else rest


def save_video(
    video: Input.Video, filename_prefix: str, format: str, quality: int, audio: dict | None, hidden: Any
) -> dict[str, Any]:
    """Write a VIDEO into the output folder in one of FORMATS; returns what the node shows. Raises VideoError."""
    clip, form = clip_of(video), formats.Format(format)
    if audio is not None:
        clip = Clip(clip.frames, clip.height, clip.width, clip.frame_rate, clip.chunks, sound_of(audio))
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory(), clip.width, clip.height
    )
    path = Path(folder) / f"{name}_{counter:05}_{form.extension}"
    write(clip, path, form, Writing(quality, _metadata(hidden), watch(clip)))
    if form is not formats.Format.PNG:
        return ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.output)]).as_dict()
    files = sorted(path.iterdir())[:SHOWN_PICTURES]
    results = [
        ui.SavedResult(file.name, f"{subfolder}/{path.name}".lstrip("/"), io.FolderType.output) for file in files
    ]
    return {"images": results}


def _metadata(hidden: Any) -> dict[str, Any]:
    """Workflow and prompt of the run, unless the user has the host leave them out."""
    if args.disable_metadata:
        return {}
    prompt = {"prompt": hidden.prompt} if hidden.prompt is not None else {}
    return dict(hidden.extra_pnginfo or {}) | prompt


def list_videos() -> list[str]:
    """Files of the input folder that may be videos, and the demo's own clips."""
    folder = folder_paths.get_input_directory()
    files = [file for file in os.listdir(folder) if os.path.isfile(os.path.join(folder, file))]
    films = folder_paths.filter_files_content_types(files, ["video"])
    return sorted({*films, *(file for file in files if file.lower().endswith(".gif")), *_demo_clips()})


def known_video(name: str | None) -> bool | str:
    """True, or the sentence for a workflow that names a file the user lacks; None (linked) is not known yet."""
    if name is None or folder_paths.exists_annotated_filepath(name) or name in _demo_clips():
        return True
    return f"The video {name} is not in your input folder. Choose another, or upload it with the button on the node."


def state_of(name: str) -> tuple[str, float, int]:
    """What changes when the file does."""
    found = os.stat(_path_of(name))
    return name, found.st_mtime, found.st_size


def _demo_clips() -> dict[str, Path]:
    """The clips that come with the pack, so that its workflows run where the input folder is still empty."""
    return {path.name: path for path in DEMO_CLIPS.glob("*.mp4")}


def _path_of(name: str) -> Path:
    """The user's file of that name, else the demo's clip."""
    if not folder_paths.exists_annotated_filepath(name) and name in _demo_clips():
        return _demo_clips()[name]
    return Path(folder_paths.get_annotated_filepath(name))


def load_video(
    file: str | Path,
    *,
    frame_rate: float,
    skip_frames: int,
    every_nth: int,
    frame_cap: int,
    width: int,
    height: int,
    fit: str,
) -> StreamedVideo:
    """A file of the input folder, or at a path, as a VIDEO that decodes when it is used. Raises VideoError."""
    rate = Fraction(frame_rate).limit_denominator(1001)
    selection = Selection(rate, skip_frames, every_nth, frame_cap)
    path, name = (file, file.name) if isinstance(file, Path) else (_path_of(file), file)
    return StreamedVideo(read_clip(path, name, selection, Frame(height, width, Fit(fit))))
