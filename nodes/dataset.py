"""What is learned from: folders of videos, and clips of the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import dataset as data
from ..host.video import FITS
from .checked import Node
from .sockets import CATEGORY, VideoDatasetSocket

DATASET_TIP = "Videos with captions, for the training nodes. Pictures are read when they are needed."


class LoadVideoDataset(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadVideoDataset",
            display_name="Load Video Dataset",
            category=f"{CATEGORY}/training",
            description="Videos and pictures of a folder, with their captions, to train on. Long videos can be split "
            "into their shots.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="The folder with the videos: a path, or a name in ComfyUI's input folder. Folders in it "
                    "are read too.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="What videos show that have no caption of their own. The others have a text file beside "
                    "them (a.txt for a.mp4) or a row in a CSV file.",
                ),
                io.Float.Input(
                    "frame_rate",
                    default=8.0,
                    min=0.0,
                    max=240.0,
                    step=0.01,
                    tooltip="Frames a second to read at; the speed stays. 0 keeps that of each file.",
                ),
                *_size_inputs(),
                *_shot_inputs(),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    optional=True,
                    tooltip="Every video a second time with left and right exchanged, as AnimateDiff's motion modules "
                    "were trained. Not where left and right matter: pans, text, captions that name them.",
                ),
            ],
            outputs=[
                VideoDatasetSocket.Output(display_name="dataset", tooltip=DATASET_TIP),
                io.String.Output(display_name="table", tooltip="What was found: a line for each video or shot."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        return data.known_folder(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **settings: object) -> object:
        """A folder that is linked is known only when the node runs, so it runs every time."""
        return float("nan") if folder is None else data.state_of_folder(folder)

    @classmethod
    def execute(cls, folder: str, **settings: object) -> io.NodeOutput:
        loaded = data.load_dataset(folder, **settings)
        return io.NodeOutput(loaded, loaded.table())


def _size_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "width",
            default=256,
            min=0,
            max=4096,
            tooltip="Width to train at, in pixels. 0 follows the height; both 0 keep the size of the files.",
        ),
        io.Int.Input(
            "height",
            default=256,
            min=0,
            max=4096,
            tooltip="Height to train at, in pixels. 0 follows the width.",
        ),
        io.Combo.Input(
            "fit",
            options=FITS,
            default=FITS[0],
            tooltip="When width and height have other proportions than a file. crop: fill, and cut what hangs over. "
            "pad: show all, with black bars. stretch: distort.",
        ),
    ]


def _shot_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "split_shots",
            default=False,
            tooltip="Looks for cuts, so that no training clip contains one. A caption file then has one line for all "
            "shots, or one for each.",
        ),
        io.Float.Input(
            "shot_threshold",
            default=0.3,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How much the colours of two frames must differ to be a cut: 0 not at all, 1 entirely.",
        ),
        io.Int.Input(
            "frame_cap", default=0, min=0, max=10_000_000, tooltip="Read at most this many frames of each. 0: all."
        ),
    ]


class CollectClips(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionCollectClips",
            display_name="Collect Clips",
            category=f"{CATEGORY}/training",
            description="Puts clips of the graph and what they show into a dataset. Chain several for clips of "
            "different lengths and captions.",
            inputs=[
                io.MultiType.Input(
                    "clips",
                    types=[io.Image, io.Video, VideoDatasetSocket],
                    tooltip="Images one after another, a video or another dataset, in the size to train at.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What images or a video show: one line for all clips, or one for each. A dataset brings "
                    "its own.",
                ),
                io.Int.Input(
                    "clip_length",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Frames per clip where there are several one after another. 0: they are one clip.",
                ),
                VideoDatasetSocket.Input("dataset", optional=True, tooltip="A dataset to put the clips behind."),
            ],
            outputs=[VideoDatasetSocket.Output(display_name="dataset", tooltip=DATASET_TIP)],
        )

    @classmethod
    def execute(cls, clips: object, captions: str, clip_length: int, dataset: object | None = None) -> io.NodeOutput:
        return io.NodeOutput(data.collect(clips, captions, clip_length, dataset))


class CameraMotionClips(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionCameraMotionClips",
            display_name="Camera Motion Clips",
            category=f"{CATEGORY}/training",
            description="Makes reference clips for a MotionLoRA: a camera zooms, pans, tilts or rolls over stills or "
            "over clips, or moves at random, which makes videos of pictures.",
            inputs=[
                io.MultiType.Input(
                    "clips",
                    types=[io.Image, io.Video, VideoDatasetSocket],
                    tooltip="What the camera looks at: images, a video or a dataset.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What images or a video show, without the motion: one line for all, or one for each image. "
                    "A dataset brings its own.",
                ),
                *_camera_inputs(),
            ],
            outputs=[
                VideoDatasetSocket.Output(display_name="dataset", tooltip=DATASET_TIP),
                io.Video.Output(display_name="video", tooltip="The clips one after another, to look at."),
            ],
        )

    @classmethod
    def execute(cls, clips: object, captions: str, **settings: object) -> io.NodeOutput:
        return io.NodeOutput(*data.film_camera(clips, captions, **settings))


def _camera_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "motion",
            options=data.MOVES,
            default=data.MOVES[0],
            tooltip="What the camera does: in a pan to the left the picture slides to the right. random: from one "
            "part of the picture to another, another way in each clip.",
        ),
        io.Combo.Input(
            "source",
            options=data.SOURCES,
            default=data.SOURCES[0],
            tooltip="stills: one picture is held while the camera moves. clips: what is filmed goes on meanwhile.",
        ),
        io.Int.Input("frames", default=16, min=2, max=1024, tooltip="Frames of each clip."),
        io.Float.Input(
            "amount",
            default=0.4,
            min=0.01,
            max=0.9,
            step=0.01,
            tooltip="How far: the share of the picture a zoom leaves out in the end or a pan slides by; for a roll, "
            "the share of a quarter turn.",
        ),
        io.Int.Input("clips_each", default=1, min=1, max=1000, tooltip="Clips to make of every picture or clip."),
        io.Int.Input("width", default=0, min=0, max=4096, tooltip="Width in pixels. 0 follows height or the source."),
        io.Int.Input("height", default=0, min=0, max=4096, tooltip="Height in pixels. 0 follows width or the source."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFF,
            control_after_generate=False,
            tooltip="Chooses pictures of a video and places in a picture.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [LoadVideoDataset, CollectClips, CameraMotionClips]
