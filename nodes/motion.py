"""AnimateDiff: load a motion module, change it with MotionLoRAs, apply it to an image MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import inflate, motion, options, paths
from .checked import Node
from .sockets import CATEGORY, MotionModuleSocket


class LoadMotionModule(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadMotionModule",
            display_name="Load Motion Module",
            category=f"{CATEGORY}/animatediff",
            description="Loads a motion module: AnimateDiff v1, v2, v3 or SDXL beta, HotshotXL, AnimateLCM, or any "
            "module of the same build. The kind is read from the file.",
            inputs=[
                io.Combo.Input(
                    "motion_module",
                    options=paths.list_files(paths.MOTION_MODULES),
                    tooltip="A file of the folder models/animatediff_models.",
                ),
            ],
            outputs=[
                MotionModuleSocket.Output(
                    display_name="motion_module", tooltip="Goes to Apply Motion Module, or through Load MotionLoRA."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, motion_module: str) -> bool | str:
        return options.known_file(paths.MOTION_MODULES, motion_module)

    @classmethod
    def fingerprint_inputs(cls, motion_module: str | None = None) -> object:
        return paths.state_of(paths.MOTION_MODULES, motion_module)

    @classmethod
    def execute(cls, motion_module: str) -> io.NodeOutput:
        return io.NodeOutput(motion.load_motion_module(motion_module))


class LoadMotionLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadMotionLora",
            display_name="Load MotionLoRA",
            category=f"{CATEGORY}/animatediff",
            description="Changes how a motion module moves things (zoom, pan, tilt, roll). Chain several of them.",
            inputs=[
                MotionModuleSocket.Input("motion_module", tooltip="The motion module to change."),
                io.Combo.Input(
                    "motion_lora",
                    options=paths.list_files(paths.MOTION_LORAS),
                    tooltip="A file of the folder models/animatediff_motion_lora.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly it acts: 1 as trained, 0 not at all, below 0 the opposite way.",
                ),
            ],
            outputs=[
                MotionModuleSocket.Output(display_name="motion_module", tooltip="The changed motion module."),
            ],
        )

    @classmethod
    def validate_inputs(cls, motion_lora: str) -> bool | str:
        return options.known_file(paths.MOTION_LORAS, motion_lora)

    @classmethod
    def fingerprint_inputs(cls, motion_lora: str | None = None, **settings: object) -> object:
        return paths.state_of(paths.MOTION_LORAS, motion_lora)

    @classmethod
    def execute(cls, motion_module: motion.MotionModule, motion_lora: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(motion.add_motion_lora(motion_module, motion_lora, strength))


class ApplyMotionModule(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionApplyMotionModule",
            display_name="Apply Motion Module",
            category=f"{CATEGORY}/animatediff",
            description="Makes an image MODEL sample video: the frames of a clip are the images of the batch. Use any "
            "sampler node with it. Apply several to combine motion modules.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x or SDXL model, with LoRAs and the like already on it."),
                MotionModuleSocket.Input("motion_module", tooltip="From Load Motion Module or Load MotionLoRA."),
                *_amount_inputs(),
                *_clip_inputs(),
                *_per_frame_inputs(),
                _attention_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Samples whole clips. Goes to any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, start_percent: float = 0.0, end_percent: float = 1.0) -> bool | str:
        return options.known_range(start_percent, end_percent)

    @classmethod
    def execute(cls, model: io.Model.Type, motion_module: motion.MotionModule, **settings: object) -> io.NodeOutput:
        return io.NodeOutput(inflate.apply_motion(model, motion_module, options.settings(motion_module, **settings)))


def _amount_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="How much of the module's output is added: 1 as trained, 0 leaves separate images.",
        ),
        io.Float.Input(
            "motion_scale",
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="Sharpness of the attention between frames: above 1 moves more, below 1 moves less.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of the noise schedule at which the module starts to act, as for ControlNets: with denoise "
            "0.4 a run begins at 0.6.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of the noise schedule at which the module stops acting.",
        ),
    ]


def _clip_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "noise_schedule",
            options=options.SCHEDULES,
            default=options.AS_TRAINED,
            tooltip="Noise schedule of the MODEL. 'as trained' takes the one this kind of module was trained with; "
            "another one gives washed-out or noisy clips.",
        ),
        io.Int.Input(
            "frames",
            default=0,
            min=0,
            max=4096,
            tooltip="Frames per clip. 0: the whole batch is one clip. 16 with a batch of 32 makes two clips.",
        ),
        io.Combo.Input(
            "positions",
            options=options.POSITIONS,
            default=options.AS_TRAINED,
            tooltip="What to do with more frames than the module has positions for: 'as trained' stops with a "
            "message, 'stretch' spreads the frames over the known positions (slower motion).",
        ),
        io.Combo.Input(
            "group_norm",
            options=options.GROUP_NORMS,
            default=options.AS_TRAINED,
            tooltip="For AnimateDiff v1, SDXL beta and HotshotXL: 'as AnimateDiff-Evolved' repeats the images of that "
            "pack, which differ from the authors'. No effect on other modules.",
        ),
    ]


def _per_frame_inputs() -> list[io.Input]:
    kinds = [io.Mask, io.Float, io.String]
    return [
        io.MultiType.Input(
            "strength_per_frame",
            types=kinds,
            optional=True,
            tooltip="Multiplies strength frame by frame: masks (one per frame), a list of numbers, or text such as "
            "'0: 0.2, 15: 1'.",
        ),
        io.MultiType.Input(
            "motion_scale_per_frame",
            types=kinds,
            optional=True,
            tooltip="Multiplies motion_scale frame by frame: masks (one per frame), a list of numbers, or text such "
            "as '0: 0.2, 15: 1'.",
        ),
    ]


def _attention_input() -> io.Input:
    return io.Combo.Input(
        "image_attention",
        options=options.ATTENTIONS,
        default=options.HOSTS_OWN,
        optional=True,
        tooltip="What computes the attention of the image model. PyTorch's is faster where ComfyUI takes another by "
        "itself, on CPUs and Macs; clips then differ by rounding. One that another node has set stays.",
    )


NODES: list[type[io.ComfyNode]] = [LoadMotionModule, LoadMotionLora, ApplyMotionModule]
