"""Tune-A-Video: attention between frames on an image MODEL, and networks tuned on one clip."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import attention, options, paths, tuned
from .sockets import CATEGORY


class STAttention(io.ComfyNode):
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
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Frames per clip. 0: what Apply Motion Module says, or the whole batch is one clip.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples clips. Goes to any sampler.")],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, **settings: object) -> io.NodeOutput:
        return io.NodeOutput(attention.apply_frame_attention(model, options.frame_attention(**settings)))


class LoadTunedVideoModel(io.ComfyNode):
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
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Frames per clip. 0: what Apply Motion Module says, or the whole batch is one clip.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples clips. Goes to any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, tuned_model: str) -> bool | str:
        return options.known_file(paths.MOTION_MODULES, tuned_model, paths.TUNED)

    @classmethod
    def execute(cls, model: io.Model.Type, tuned_model: str, strength: float, frames: int) -> io.NodeOutput:
        return io.NodeOutput(tuned.load_tuned_model(model, tuned_model, strength, frames))


NODES: list[type[io.ComfyNode]] = [STAttention, LoadTunedVideoModel]
