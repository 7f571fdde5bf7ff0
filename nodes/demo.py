"""The demo's image model, so that every workflow of the pack runs on a machine without any model."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import demo_models
from .checked import Node
from .sockets import CATEGORY


class LoadDemoModels(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadDemoModels",
            display_name="Load Demo Models",
            category=f"{CATEGORY}/demo",
            description="Loads the small image model that comes with the pack: 128 x 128 pictures of one coloured "
            "shape, for captions such as 'a red circle moves right over a blue ground'. It takes the place of a "
            "checkpoint loader and needs no download.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The demo's image model; use it as any SD1.5 model."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, for CLIP Text Encode."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder: latents an eighth the size, as SD1.5 has."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo_models.load_unet(), demo_models.load_clip(), demo_models.load_vae())


NODES = [LoadDemoModels]
