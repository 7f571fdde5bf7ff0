"""Prompts that change from frame to frame."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import travel
from .checked import Node
from .sockets import CATEGORY

EXAMPLE = """# frame: prompt
0: a red circle moves right over a blue ground
15: a green square moves right over a blue ground"""


class PromptTravel(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionPromptTravel",
            display_name="Prompt Travel",
            category=f"{CATEGORY}/long clips",
            description="Prompts that change from frame to frame, for any MODEL, with windows or without. Keeps the "
            "keyframes only, so that a long clip needs no more memory than a short one.",
            inputs=_inputs(),
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="Goes to the positive input of a sampler."),
                io.String.Output(display_name="table", tooltip="What each range of frames sees, for a preview node."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        return travel.known_lines(prompts)

    @classmethod
    def execute(cls, clip: io.Clip.Type, **widgets: str) -> io.NodeOutput:
        plan = travel.read_travel(**widgets)
        return io.NodeOutput(travel.encode_travel(clip, plan), plan.table())


def _inputs() -> list[io.Input]:
    return [
        io.Clip.Input("clip", tooltip="The CLIP that encodes the prompts, as for CLIP Text Encode."),
        io.String.Input(
            "prompts",
            multiline=True,
            default=EXAMPLE,
            tooltip="One line per keyframe: the frame, a colon, the prompt. Frames count from 0. Several lines of one "
            "frame are mixed; '24 * 2: ...' counts twice. Lines that begin with # are comments.",
        ),
        io.Combo.Input(
            "interpolation",
            options=travel.INTERPOLATIONS,
            default=travel.INTERPOLATIONS[0],
            tooltip="Between two keyframes. linear: even change. eased: slow at both ends, fast between. hold: each "
            "prompt stays until the next one.",
        ),
        io.String.Input(
            "text_before",
            default="",
            optional=True,
            tooltip="Put before every prompt, with a space between; write a comma yourself where you want one.",
        ),
        io.String.Input(
            "text_after",
            default="",
            optional=True,
            tooltip="Put behind every prompt, with a space between; write a comma yourself where you want one.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [PromptTravel]
