"""Video files in and out, without ever holding a whole clip."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import video as films
from .checked import Node
from .sockets import CATEGORY


class LoadVideo(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadVideo",
            display_name="Load Video (Lazy)",
            category=f"{CATEGORY}/video",
            description="Loads a video file that is decoded only while something uses it, at the frame rate, length "
            "and size you ask for. Variable frame rates and turned recordings come out right.",
            inputs=[
                io.Combo.Input(
                    "video_file",
                    options=films.list_videos(),
                    upload=io.UploadType.video,
                    tooltip="A file of ComfyUI's input folder, or the demo's clip. The button below uploads one.",
                ),
                *_time_inputs(),
                *_size_inputs(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The video with its sound. Get Video Components makes "
                                "images of it."),
                io.Int.Output(display_name="frames", tooltip="How many frames the video has."),
                io.Float.Output(display_name="frame_rate", tooltip="Frames a second."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, video_file: str | None = None) -> bool | str:
        return films.known_video(video_file)

    @classmethod
    def fingerprint_inputs(cls, video_file: str, **settings: object) -> object:
        return films.state_of(video_file)

    @classmethod
    def execute(cls, video_file: str, **settings: object) -> io.NodeOutput:
        loaded = films.load_video(video_file, **settings)
        return io.NodeOutput(loaded, loaded.get_frame_count(), float(loaded.get_frame_rate()))


def _time_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "frame_rate",
            default=0.0,
            min=0.0,
            max=240.0,
            step=0.01,
            tooltip="Frames a second to load at: frames are left out or repeated, the speed stays. 0 keeps the file's.",
        ),
        io.Int.Input(
            "skip_frames",
            default=0,
            min=0,
            max=10_000_000,
            tooltip="Leave out this many frames at the start, counted at the frame rate above.",
        ),
        io.Int.Input(
            "every_nth",
            default=1,
            min=1,
            max=1000,
            tooltip="Load only every 2nd, 3rd, ... frame after that. The speed stays, the frame rate falls.",
        ),
        io.Int.Input(
            "frame_cap", default=0, min=0, max=10_000_000, tooltip="Load at most this many frames. 0 loads all."
        ),
    ]


def _size_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=16384,
            tooltip="Width to resize to while loading, in pixels. 0 follows the height; both 0 keep the file's size.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=16384,
            tooltip="Height to resize to while loading, in pixels. 0 follows the width.",
        ),
        io.Combo.Input(
            "fit",
            options=films.FITS,
            default=films.FITS[0],
            tooltip="When width and height have other proportions than the file. crop: fill, and cut what hangs over. "
            "pad: show all, with black bars. stretch: distort.",
        ),
    ]


class SaveVideo(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionSaveVideo",
            display_name="Save Video (Formats)",
            category=f"{CATEGORY}/video",
            description="Saves a video as mp4, webm, animated webp or numbered png files, with a quality setting, any "
            "size, sound, and the workflow inside. The file appears when it is whole; a failed save leaves nothing.",
            inputs=[
                io.Video.Input("video", tooltip="The video to save. It is decoded while it is saved."),
                io.String.Input(
                    "filename_prefix",
                    default="video/ComfyUI",
                    tooltip="Beginning of the file name, with folders below the output folder. Text such as "
                    "%date:yyyy-MM-dd% works as in Save Image.",
                ),
                io.Combo.Input(
                    "format",
                    options=films.FORMATS,
                    default=films.FORMATS[0],
                    tooltip="mp4 plays everywhere. webm is smaller and slower to write, AV1 the smallest. animated "
                    "webp is shown as a picture, without sound. png sequence is a folder of exact frames.",
                ),
                io.Int.Input(
                    "quality",
                    default=films.formats.DEFAULT_QUALITY,
                    min=0,
                    max=100,
                    tooltip="Higher is better and larger. 80 cannot be told from the original; 100 makes webp "
                    "lossless. png sequences are exact at any setting.",
                ),
                io.Audio.Input("audio", optional=True, tooltip="Sound to save in place of the video's own."),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, video: io.Video.Type, filename_prefix: str, format: str, quality: int, audio: dict | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(ui=films.save_video(video, filename_prefix, format, quality, audio, cls.hidden))


NODES: list[type[io.ComfyNode]] = [LoadVideo, SaveVideo]
