"""Training in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import motion, options, paths, train, train_stages
from .checked import Node
from .sockets import CATEGORY, MotionModuleSocket, VideoDatasetSocket

MODEL_TIP = "The image model, from before Apply Motion Module. It stays as it is."


class TrainMotionLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTrainMotionLora",
            display_name="Train MotionLoRA",
            category=f"{CATEGORY}/training",
            description="Teaches a motion module a way of moving from reference clips, and saves it as a MotionLoRA. "
            "Cancel keeps what was learned: run the workflow again to go on.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                MotionModuleSocket.Input(
                    "motion_module", tooltip="The motion module the MotionLoRA is for. It stays as it is."
                ),
                *_reading_inputs(),
                *_clips_inputs("The reference clips", "without the motion to be learned"),
                file_input("my_motion", "animatediff_motion_lora"),
                _rank_input("Size of the change to each layer: 64 as the published files, less for smaller files.", 64),
                io.Float.Input(
                    "alpha",
                    default=64.0,
                    min=0.01,
                    max=4096.0,
                    step=0.01,
                    tooltip="The change counts alpha / rank: equal to rank is as published. It is written into the "
                    "weights.",
                ),
                *_step_inputs(2000, 0.0005),
                *_clip_inputs(),
                *_batch_inputs(1),
                *run_inputs(),
                _noise_input(),
                io.String.Input(
                    "layers",
                    default="",
                    optional=True,
                    tooltip="Layers to change: parts of their names, such as to_q or up_blocks. Empty: all of them, as "
                    "published.",
                ),
                _levels_input(),
                _seen_input(),
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
        made = train.train_motion_lora(model, motion_module, clip, vae, clips, captions, how)
        return io.NodeOutput(made, ui=how.report.shown())


class TrainDomainAdapter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTrainDomainAdapter",
            display_name="Train Domain Adapter",
            category=f"{CATEGORY}/training",
            description="First stage of AnimateDiff: teaches the image model how single frames of the videos look, as "
            "a LoRA, so that the motion module need not learn it. Cancel keeps what was learned.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                *_reading_inputs(),
                *_clips_inputs("The videos or pictures", "as you will prompt for it"),
                file_input("my_adapter", "loras"),
                _rank_input("Size of the change to each layer: 128 as v3's adapter, less for smaller files.", 128),
                *_step_inputs(2000, 0.0001),
                *_batch_inputs(4, "Pictures"),
                *run_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with the adapter at strength 1: for Train Motion Module.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        return options.known_new_file("loras", file_name)

    @classmethod
    def execute(
        cls, model: io.Model.Type, clip: io.Clip.Type, vae: io.Vae.Type, clips: object, captions: str,
        **settings: object,
    ) -> io.NodeOutput:  # fmt: skip
        how = options.adapter_training(**settings)
        made = train_stages.train_domain_adapter(model, clip, vae, clips, captions, how)
        return io.NodeOutput(made, ui=how.report.shown())


class TrainMotionModule(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTrainMotionModule",
            display_name="Train Motion Module",
            category=f"{CATEGORY}/training",
            description="Second stage of AnimateDiff: teaches a motion module, a new one or one you have, how things "
            "move. It takes many videos and a large graphics card. Cancel keeps what was learned.",
            inputs=[
                io.Model.Input("model", tooltip=f"{MODEL_TIP} Best with its domain adapter on it."),
                *_reading_inputs(),
                *_clips_inputs("The videos", "with the motion"),
                file_input("my_motion_module", "animatediff_models"),
                io.Combo.Input(
                    "layout",
                    options=options.LAYOUTS,
                    default=options.LAYOUTS[0],
                    tooltip="Where a new motion module sits in the model. Only v2's can have MotionLoRAs that change "
                    "the middle block. Temporal convolution: no attention, to compare with. Unused where "
                    "motion_module is connected.",
                ),
                *_step_inputs(20000, 0.0001),
                *_clip_inputs(),
                *_batch_inputs(1, accumulate=4),
                *run_inputs(500),
                MotionModuleSocket.Input(
                    "motion_module",
                    optional=True,
                    tooltip="A motion module to start from; it stays as it is. Unconnected: a new one.",
                ),
                _noise_input(),
                _levels_input(),
                _seen_input(),
                _optimiser_input(),
            ],
            outputs=[
                MotionModuleSocket.Output(display_name="motion_module", tooltip="The motion module that was trained."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        return options.known_new_file(paths.MOTION_MODULES, file_name)

    @classmethod
    def execute(
        cls, model: io.Model.Type, clip: io.Clip.Type, vae: io.Vae.Type, clips: object, captions: str,
        motion_module: motion.MotionModule | None = None, **settings: object,
    ) -> io.NodeOutput:  # fmt: skip
        how = options.module_training(**settings)
        made = train_stages.train_motion_module(model, clip, vae, clips, captions, how, motion_module)
        return io.NodeOutput(made, ui=how.report.shown())


def _reading_inputs() -> list[io.Input]:
    return [
        io.Clip.Input("clip", tooltip="The text encoder that belongs to the model. Each caption is read once."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model. Each picture is encoded once."),
    ]


def _clips_inputs(what: str, how: str) -> list[io.Input]:
    return [
        io.MultiType.Input(
            "clips",
            types=[io.Image, io.Video, VideoDatasetSocket],
            tooltip=f"{what}, in the size to train at: a dataset, images one after another, or a video.",
        ),
        io.String.Input(
            "captions",
            default="",
            multiline=True,
            tooltip=f"What images or a video show, {how}: one line for all, or one for each. A dataset brings its own.",
        ),
    ]


def file_input(default: str, folder: str) -> io.Input:
    return io.String.Input("file_name", default=default, tooltip=f"The file to write, in the folder models/{folder}.")


def _rank_input(tooltip: str, default: int) -> io.Input:
    return io.Int.Input("rank", default=default, min=1, max=1024, tooltip=tooltip)


def _step_inputs(steps: int, rate: float) -> list[io.Input]:
    return [
        io.Int.Input("steps", default=steps, min=1, max=1000000, tooltip="How many times the weights are changed."),
        io.Float.Input(
            "learning_rate",
            default=rate,
            min=0.0,
            max=1.0,
            step=0.00001,
            tooltip="Largest change of a weight in a step. Higher learns sooner, and may spoil the pictures.",
        ),
    ]


def _clip_inputs() -> list[io.Input]:
    return [
        io.Int.Input("frames", default=16, min=2, max=1024, tooltip="Frames of a training clip."),
        io.Int.Input(
            "stride",
            default=1,
            min=1,
            max=64,
            tooltip="Every how many frames of a clip one is taken: 1 at 8 frames a second, as Load Video Dataset reads "
            "them, 4 at 30, as AnimateDiff learned.",
        ),
        io.Int.Input(
            "clip_length",
            default=0,
            min=0,
            max=100000,
            tooltip="Frames per reference clip where there are several one after another. 0: they are one clip.",
        ),
    ]


def _batch_inputs(size: int, what: str = "Training clips", accumulate: int = 1) -> list[io.Input]:
    return [
        io.Int.Input("batch_size", default=size, min=1, max=64, tooltip=f"{what} worked on at once."),
        io.Int.Input(
            "accumulate",
            default=accumulate,
            min=1,
            max=1024,
            tooltip="Batches that make one step: as a larger batch, in the memory of a small one.",
        ),
    ]


def _noise_input() -> io.Input:
    return io.Float.Input(
        "high_noise_weight",
        default=1.0,
        min=1.0,
        max=10000.0,
        step=1.0,
        optional=True,
        tooltip="How many times more the noisiest levels may count, at which it is decided where things are. 1: all "
        "alike, as published.",
    )


def _levels_input() -> io.Input:
    return io.Combo.Input(
        "noise_levels",
        options=options.NOISE_LEVELS,
        default=options.ALL_ALIKE,
        optional=True,
        tooltip="At which noise levels is learned. 'half from the noisiest' takes every other one from the noisiest "
        "seventh, where it is decided which way things go. 'all alike' as published.",
    )


def _seen_input() -> io.Input:
    return io.Int.Input(
        "frames_seen",
        default=0,
        min=0,
        max=4096,
        optional=True,
        tooltip="Frames of a clip that a step sees, each time others, at their places in time: 8 of 16 take about half "
        "of the time and less memory, and the clips made later are as long as ever. 0: all of them, as published.",
    )


def _optimiser_input() -> io.Input:
    return io.Combo.Input(
        "optimiser",
        options=options.OPTIMISER_NAMES,
        default=options.OPTIMISER_NAMES[0],
        optional=True,
        tooltip="What turns gradients into steps. AdamW as published; Muon, which moves a weight matrix as far in all "
        "its directions, learned sooner on the demo's clips, at a higher learning rate.",
    )


def run_inputs(
    save_every: int = 50, seed: int = 0, chosen: str = "clips, noise and the first weights"
) -> list[io.Input]:
    """The widgets every training has. chosen: what the seed decides, in words."""
    return [
        io.Int.Input(
            "seed",
            default=seed,
            min=0,
            max=0xFFFFFFFF,
            control_after_generate=False,
            tooltip=f"Chooses {chosen}. The same seed learns the same.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            tooltip="Computes the layers twice to need a fraction of the memory. The result stays the same.",
        ),
        io.Int.Input(
            "save_every",
            default=save_every,
            min=1,
            max=100000,
            tooltip="Steps between two states on the disk, from which a crashed run goes on.",
        ),
        io.Combo.Input(
            "existing",
            options=options.EXISTING,
            default=options.GO_ON,
            tooltip="'go on' takes up an interrupted run and keeps a finished file. 'start over' replaces the file, "
            "and what was begun with other settings.",
        ),
        io.Int.Input(
            "sample_every",
            default=250,
            min=0,
            max=100000,
            tooltip="Steps between two clips that are drawn, in approximate colours, to look at below the losses. "
            "0: none.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [TrainMotionLora, TrainDomainAdapter, TrainMotionModule]
