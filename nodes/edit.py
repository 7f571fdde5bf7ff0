"""Editing clips that are there: up to their noise and down again, and how well that went."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import evaluate, invert
from .checked import Node
from .sockets import CATEGORY, LatentPathSocket


class DdimInversion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionDDIMInversion",
            display_name="DDIM Inversion",
            category=f"{CATEGORY}/editing",
            description="Finds the noise from which a MODEL samples a clip that you have. Sample it again with another "
            "prompt to edit the clip and keep its layout and motion.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that will sample the edit: with motion, windows, tuning."),
                io.Conditioning.Input("positive", tooltip="What the clip shows; an empty prompt is usual."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode: one latent per frame."),
                *_schedule_inputs(),
                *_way_inputs(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Needed for a cfg other than 1 only."
                ),
                io.Float.Input(
                    "standardise",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far the noise of every frame and channel is brought to mean 0 and deviation 1: 0.75 "
                    "for edits of the ground, whose colour the noise of few steps holds on to.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The noisy clip. For SamplerCustom and KSampler (Advanced), with add_noise switched off.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule to sample it with, for custom samplers."),
                io.Noise.Output(
                    display_name="noise",
                    tooltip="The same for SamplerCustomAdvanced, with the clip you started from at its latent_image; "
                    "goes together with masks.",
                ),
                io.Float.Output(
                    display_name="error", tooltip="Relative RMSE of the latents sampled back; NaN when not measured."
                ),
                LatentPathSocket.Output(
                    display_name="path", tooltip="The last frames at every noise level, for Reuse and Diffuse."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: io.Model.Type, positive: io.Conditioning.Type, latent: io.Latent.Type,
        negative: io.Conditioning.Type | None = None, **settings: object,
    ) -> io.NodeOutput:  # fmt: skip
        found = invert.invert_clip(model, positive, latent, invert.read_inversion(**settings), negative)
        outputs = found.latent, found.sigmas, found.noise, found.error, found.path
        return io.NodeOutput(*outputs, ui=ui.PreviewText(found.report))


def _schedule_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=50,
            min=1,
            max=10000,
            tooltip="Steps up to the noise, and later down again. More come back closer to the clip.",
        ),
        io.Combo.Input(
            "scheduler",
            options=invert.SCHEDULERS,
            default=invert.SCHEDULERS[0],
            tooltip="Where the steps are. ddim_uniform is that of Tune-A-Video.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Below 1 the clip is led up only part of the way: the edit stays closer to it. Steps are as in a "
            "KSampler with this denoise.",
        ),
    ]


def _way_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance on the way up. Leave it at 1, also where the edit is sampled with more.",
        ),
        io.Combo.Input(
            "convention",
            options=invert.CONVENTIONS,
            default=invert.CONVENTIONS[0],
            tooltip="released code: as Tune-A-Video, the network is told the level a step leads to. standard: the "
            "level it starts from.",
        ),
        io.Int.Input(
            "keep_frames",
            default=16,
            min=0,
            max=4096,
            tooltip="How many frames from the end are kept at every step for the output path. 0 keeps none.",
        ),
        io.Boolean.Input(
            "reconstruct",
            default=True,
            tooltip="Also samples back without edits and shows how far off the clip is. Takes as long again.",
        ),
    ]


class EvaluateVideo(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionEvaluate",
            display_name="Evaluate Video",
            category=f"{CATEGORY}/editing",
            description="Measures with CLIP how much the frames of a video agree with each other, and how well they "
            "show a text: the two figures by which Tune-A-Video compares edits.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Load CLIP Vision: ViT-L, ViT-H or ViT-bigG."),
                io.MultiType.Input(
                    "video",
                    types=[io.Image, io.Video],
                    tooltip="The frames, as images or as a video, which is decoded a few frames at a time.",
                ),
                io.String.Input(
                    "text", default="", multiline=True, tooltip="The prompt of the edit: what the frames should show."
                ),
                io.Combo.Input(
                    "crop",
                    options=evaluate.CROPS,
                    default=evaluate.CROPS[0],
                    tooltip="How frames that are not square are shown to CLIP. center: the middle. none: squeezed.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="From Load CLIP: the text encoder trained together with clip_vision. Without it only "
                    "frame consistency is measured.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="frame_consistency", tooltip="Mean cosine of all pairs of frames, x 100."
                ),
                io.Float.Output(
                    display_name="textual_faithfulness",
                    tooltip="Mean cosine of frames and text, x 100; NaN when not measured.",
                ),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip_vision: io.ClipVision.Type, video: object, text: str, crop: str, clip: io.Clip.Type | None = None
    ) -> io.NodeOutput:
        found = evaluate.evaluate(clip_vision, video, text, crop, clip)
        return io.NodeOutput(found.consistency, found.faithfulness, ui=ui.PreviewText(found.report))


NODES: list[type[io.ComfyNode]] = [DdimInversion, EvaluateVideo]
