"""Training in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import motion, options, paths, train
from .sockets import CATEGORY, MotionModuleSocket, VideoDatasetSocket


class TrainMotionLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTrainMotionLora",
            display_name="Train MotionLoRA",
            category=f"{CATEGORY}/training",
            description="Teaches a motion module a way of moving from reference clips, and saves it as a MotionLoRA. "
            "Cancel keeps what was learned: run the workflow again to go on.",
            inputs=[
                io.Model.Input("model", tooltip="The image model, from before Apply Motion Module. It stays as it is."),
                MotionModuleSocket.Input(
                    "motion_module", tooltip="The motion module the MotionLoRA is for. It stays as it is."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model. Each caption is read once."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model. Each picture is encoded once."),
                io.MultiType.Input(
                    "clips",
                    types=[io.Image, io.Video, VideoDatasetSocket],
                    tooltip="The reference clips, in the size to train at: a dataset, images one after another, or a "
                    "video.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What images or a video show, without the motion to be learned: one line for all clips, or "
                    "one for each. A dataset brings its own.",
                ),
                *_file_inputs(),
                *_recipe_inputs(),
                *_clip_inputs(),
                *_run_inputs(),
            ],
            outputs=[
                MotionModuleSocket.Output(
                    display_name="motion_module", tooltip="The motion module with the new MotionLoRA at strength 1."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        return options.known_new_file(paths.MOTION_LORAS, file_name)

    @classmethod
    def execute(
        cls, model: io.Model.Type, motion_module: motion.MotionModule, clip: io.Clip.Type, vae: io.Vae.Type,
        clips: object, captions: str, **settings: object,
    ) -> io.NodeOutput:  # fmt: skip
        how = options.lora_training(**settings)
        return io.NodeOutput(train.train_motion_lora(model, motion_module, clip, vae, clips, captions, how))


def _file_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "file_name",
            default="my_motion",
            tooltip="The file to write, in the folder models/animatediff_motion_lora.",
        ),
    ]


def _recipe_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "rank",
            default=64,
            min=1,
            max=1024,
            tooltip="Size of the change to each layer: 64 as the published files, less for smaller files.",
        ),
        io.Float.Input(
            "alpha",
            default=64.0,
            min=0.01,
            max=4096.0,
            step=0.01,
            tooltip="The change counts alpha / rank: equal to rank is as published. It is written into the weights.",
        ),
        io.Int.Input("steps", default=2000, min=1, max=1000000, tooltip="How many times the weights are changed."),
        io.Float.Input(
            "learning_rate",
            default=0.0005,
            min=0.0,
            max=1.0,
            step=0.00001,
            tooltip="Largest change of a weight in a step. Higher learns sooner, and may spoil the pictures.",
        ),
    ]


def _clip_inputs() -> list[io.Input]:
    return [
        io.Int.Input("frames", default=16, min=2, max=1024, tooltip="Frames of a training clip."),
        io.Int.Input("stride", default=1, min=1, max=64, tooltip="Every how many frames of a clip one is taken."),
        io.Int.Input(
            "clip_length",
            default=0,
            min=0,
            max=100000,
            tooltip="Frames per reference clip where there are several one after another. 0: they are one clip.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Training clips worked on at once."),
        io.Int.Input(
            "accumulate",
            default=1,
            min=1,
            max=1024,
            tooltip="Batches that make one step: as a larger batch, in the memory of a small one.",
        ),
    ]


def _run_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFF,
            control_after_generate=False,
            tooltip="Chooses clips, noise and the first weights. The same seed learns the same.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            tooltip="Computes the layers twice to need a fraction of the memory. The result stays the same.",
        ),
        io.Int.Input(
            "save_every",
            default=50,
            min=1,
            max=100000,
            tooltip="Steps between two states on the disk, from which a crashed run goes on.",
        ),
        io.Combo.Input(
            "existing",
            options=options.EXISTING,
            default=options.GO_ON,
            tooltip="'go on' takes up an interrupted run and keeps a finished file; 'start over' replaces them.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [TrainMotionLora]
