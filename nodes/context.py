"""Long clips on any MODEL: sliding context windows, or clip after clip."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import context, options, reuse
from .checked import Node
from .sockets import CATEGORY, LatentPathSocket


class SlidingContext(Node):
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
    def validate_inputs(cls, context_length: int = 16, context_overlap: int = 8, context_stride: int = 1) -> bool | str:
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
            default=8,
            min=0,
            max=4095,
            tooltip="Frames that neighbouring windows share. More is smoother and slower: 4 takes two thirds of the "
            "time of 8, with larger jumps between windows. 0 puts them side by side.",
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
            "without a seam. It bridges with context_overlap; where that is 0 it changes nothing.",
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
            default=options.NOISE_KINDS[1],
            tooltip="Starting noise of later windows. FreeNoise shuffle: the first window's in another order, so that "
            "windows agree on what stands where. independent: as it comes. repeated: the first window's again. Noise "
            "of DDIM Inversion always stays as it is.",
        ),
    ]


class ReuseAndDiffuse(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionReuseAndDiffuse",
            display_name="Reuse and Diffuse",
            category=f"{CATEGORY}/long clips",
            description="Samples a long batch clip after clip in one sampling run; each clip starts from the reversed "
            "noise of the one before and is led by its last frames, so that the seam shows less. Nothing is trained.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that samples, with its motion module already applied."),
                *_reuse_inputs(),
                io.Latent.Input(
                    "continue_from",
                    optional=True,
                    tooltip="A finished clip. The first new clip is led by its last frames as if it had just been "
                    "sampled; its own frames are not in the result.",
                ),
                LatentPathSocket.Input(
                    "continue_from_path",
                    optional=True,
                    tooltip="The same from DDIM Inversion: a clip that leads by its own noise and states.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples clip after clip. Goes to a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, clip_length: int = 16, prompt_frames: int = 8) -> bool | str:
        return options.known_reuse(clip_length, prompt_frames)

    @classmethod
    def execute(
        cls, model: io.Model.Type, continue_from: io.Latent.Type | None = None, continue_from_path: object = None,
        **settings: object,
    ) -> io.NodeOutput:  # fmt: skip
        how = options.reuse_settings(**settings)
        return io.NodeOutput(reuse.apply_reuse(model, how, continue_from, continue_from_path))


def _reuse_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "clip_length",
            default=16,
            min=1,
            max=4096,
            tooltip="Frames per clip: 16 for most motion modules. The batch of the latent must be a multiple of it.",
        ),
        io.Int.Input(
            "prompt_frames",
            default=8,
            min=0,
            max=4096,
            tooltip="M of the paper: how many first frames of a clip are led by the last ones of the clip before. Half "
            "of clip_length, as there.",
        ),
        io.Float.Input(
            "alpha",
            default=4.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            tooltip="How much noise of the clip before the other frames keep: 0 none, 1 a correlation of 0.71, 4 of "
            "0.97. More is steadier and repeats more.",
        ),
        io.Float.Input(
            "beta",
            default=0.4,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of the sampling steps in which the first frame is led; it falls to 0 over prompt_frames.",
        ),
        io.Combo.Input(
            "guidance",
            options=options.GUIDANCES,
            default=options.GUIDANCES[0],
            tooltip="paper: the results of the led steps are taken from the clip before. released code: what goes into "
            "them, which is one step less.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [SlidingContext, ReuseAndDiffuse]
