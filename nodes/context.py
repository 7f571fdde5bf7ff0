"""Long clips: sliding context windows on any MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import context, options
from .sockets import CATEGORY


class SlidingContext(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionSlidingContext",
            display_name="Sliding Context",
            category=f"{CATEGORY}/long clips",
            description="Samples clips longer than the model knows: window by window, with overlap, in one sampling "
            "run and with the memory of one window. For image models with motion and for video models.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that samples, with its motion module already applied."),
                *_window_inputs(),
                *_blend_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples clips of any length. Goes to a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, context_length: int = 16, context_overlap: int = 4, context_stride: int = 1) -> bool | str:
        return options.known_windows(context_length, context_overlap, context_stride)

    @classmethod
    def execute(cls, model: io.Model.Type, **settings: object) -> io.NodeOutput:
        return io.NodeOutput(context.apply_context(model, options.sliding_context(**settings)))


def _window_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "context_length",
            default=16,
            min=1,
            max=4096,
            tooltip="Frames per window, counted in latent frames: 16 for most motion modules, 8 for HotshotXL.",
        ),
        io.Int.Input(
            "context_overlap",
            default=4,
            min=0,
            max=4095,
            tooltip="Frames that neighbouring windows share. More is smoother and slower.",
        ),
        io.Combo.Input(
            "schedule",
            options=options.WINDOW_SCHEDULES,
            default=options.WINDOW_SCHEDULES[0],
            tooltip="standard static: the same windows at every step. standard uniform: they move from step to step. "
            "looped uniform: they also run on from the last frame into the first. batched: side by side, no overlap.",
        ),
        io.Int.Input(
            "context_stride",
            default=1,
            min=1,
            max=8,
            tooltip="Above 1 the uniform schedules add windows over every 2nd, 4th, ... frame, which ties far frames "
            "together.",
        ),
        io.Boolean.Input(
            "closed_loop",
            default=False,
            tooltip="For looped uniform: always bridge the last and the first frame, so that the clip repeats "
            "without a seam.",
        ),
    ]


def _blend_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "fuse",
            options=options.FUSE_METHODS,
            default=options.FUSE_METHODS[0],
            tooltip="How overlapping windows are averaged. pyramid: the middle of a window counts most. flat: all "
            "alike. relative: as pyramid, almost nothing at the ends. overlap-linear: fades over the overlap only.",
        ),
        io.Combo.Input(
            "noise",
            options=options.NOISE_KINDS,
            default=options.NOISE_KINDS[0],
            tooltip="Starting noise of later windows. independent: as the sampler draws it. FreeNoise shuffle: the "
            "first window's noise in another order, so that windows agree more. repeated: the same again.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [SlidingContext]
