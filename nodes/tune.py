"""Tune-A-Video: attention between frames on an image MODEL, and networks tuned on one clip."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import attention, options, paths, tune, tuned
from .checked import Node
from .sockets import CATEGORY
from .train import file_input, run_inputs


class STAttention(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionSTAttention",
            display_name="ST-Attention",
            category=f"{CATEGORY}/tune a video",
            description="Lets the frames of a clip see each other in the image model's own attention, without any "
            "training (Tune-A-Video): the frames of a batch become views of one scene.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without a motion module."),
                io.Combo.Input(
                    "keys_from",
                    options=options.REACHES,
                    default=options.REACHES[0],
                    tooltip="The frames that a frame looks at: 'first and previous' as Tune-A-Video, 'per frame' as "
                    "images. Attention takes, for m frames: per frame 1, first and previous 2, causal m/2, full m "
                    "times the time.",
                ),
                io.Boolean.Input(
                    "joint_group_norm",
                    default=True,
                    tooltip="Takes the norms of the residual layers over all frames of a clip, as Tune-A-Video. Off "
                    "leaves them per frame; switch it off with motion modules that were trained so.",
                ),
                _frames_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples clips. Goes to any sampler.")],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, **settings: object) -> io.NodeOutput:
        return io.NodeOutput(attention.apply_frame_attention(model, options.frame_attention(**settings)))


def _frames_input() -> io.Input:
    return io.Int.Input(
        "frames",
        default=0,
        min=0,
        max=4096,
        tooltip="Frames per clip. 0: what Apply Motion Module says, or the whole batch is one clip.",
    )


class LoadTunedVideoModel(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadTunedVideoModel",
            display_name="Load Tuned Video Model",
            category=f"{CATEGORY}/tune a video",
            description="Turns an image MODEL into the video model that was tuned on one clip (Tune-A-Video): "
            "attention between frames, temporal layers, and changed weights.",
            inputs=[
                io.Model.Input("model", tooltip="The image model it was tuned on."),
                io.Combo.Input(
                    "tuned_model",
                    options=paths.list_files(paths.MOTION_MODULES),
                    tooltip="A file of the folder models/animatediff_models, or of a Tune-A-Video folder in there.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Share of what was tuned: 1 as tuned, 0 leaves ST-Attention on the untuned model.",
                ),
                _frames_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples clips. Goes to any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, tuned_model: str) -> bool | str:
        return options.known_file(paths.MOTION_MODULES, tuned_model, paths.TUNED)

    @classmethod
    def fingerprint_inputs(cls, tuned_model: str | None = None, **settings: object) -> object:
        return paths.state_of(paths.MOTION_MODULES, tuned_model)

    @classmethod
    def execute(cls, model: io.Model.Type, tuned_model: str, strength: float, frames: int) -> io.NodeOutput:
        return io.NodeOutput(tuned.load_tuned_model(model, tuned_model, strength, frames))


class TuneVideoModel(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTuneVideoModel",
            display_name="Tune Video Model",
            category=f"{CATEGORY}/tune a video",
            description="Tunes an image model on one clip and its prompt (Tune-A-Video), saves what changed, and gives "
            "the video model. Cancel keeps what was learned: run the workflow again to go on.",
            inputs=[
                io.Model.Input("model", tooltip="The image model, personalised ones too. It stays as it is."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model. The prompt is read once."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model. Each picture is encoded once."),
                io.MultiType.Input(
                    "video",
                    types=[io.Image, io.Video],
                    tooltip="The clip: images or a video, in the size to tune at.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the clip shows. Other words in its place make the edited clip later.",
                ),
                file_input("my_clip", "animatediff_models"),
                *_recipe_inputs(),
                *run_inputs(seed=33, chosen="noise and the first weights"),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The tuned model, which samples clips.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        return options.known_new_file(paths.MOTION_MODULES, file_name)

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        vae: io.Vae.Type,
        video: object,
        prompt: str,
        base_name: str | None = None,
        **settings: object,
    ) -> io.NodeOutput:
        """base_name: file of the image model, where no graph says it."""
        if base_name is None:
            base_name = tune.loader_name(cls.hidden.prompt, cls.hidden.unique_id)
        how = options.tuning(**settings, base_name=base_name)
        made = tune.tune_video_model(model, clip, vae, video, prompt, how)
        return io.NodeOutput(made, ui=how.report.shown())


def _recipe_inputs() -> list[io.Input]:
    return [
        io.Int.Input("steps", default=500, min=1, max=1000000, tooltip="How many times the weights are changed."),
        io.Float.Input(
            "learning_rate",
            default=0.00003,
            min=0.0,
            max=1.0,
            step=0.000001,
            tooltip="Change of a weight in a step, the same from first to last. Higher learns sooner and forgets more.",
        ),
        io.Int.Input("frames", default=24, min=2, max=1024, tooltip="Frames of the clip that are learned."),
        io.Int.Input(
            "stride",
            default=2,
            min=1,
            max=64,
            tooltip="Every how many frames of the video one is taken, from the start.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [STAttention, LoadTunedVideoModel, TuneVideoModel]
