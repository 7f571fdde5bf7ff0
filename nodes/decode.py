"""Latents of clips to pixels and back in bounded memory, and the temporal VAEs in files the host does not know."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import io

from ..host import options, paths, temporal_vae
from ..host.encode import encode_video
from ..host.vae import decode_video
from .checked import Node
from .sockets import CATEGORY


class LoadTemporalVae(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionLoadTemporalVAE",
            display_name="Load Temporal VAE",
            category=f"{CATEGORY}/vae",
            description="Loads a VAE whose decoder looks across frames: that of Stable Video Diffusion, also in "
            "diffusers' layout, or the fine-tuned one of Reuse and Diffuse. Both decode latents of SD1.x and SD2.x.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=paths.list_files(paths.VAES),
                    tooltip="A file of the folder models/vae.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="Goes to Temporal VAE Decode; encodes as any VAE.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str) -> bool | str:
        return options.known_file(paths.VAES, vae_name)

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None = None) -> object:
        return paths.state_of(paths.VAES, vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(temporal_vae.load_temporal_vae(vae_name))


class TemporalVaeDecode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTemporalVAEDecode",
            display_name="Temporal VAE Decode",
            category=f"{CATEGORY}/vae",
            description="Decodes the latents of clips with bounded memory. With the VAE of Stable Video Diffusion or "
            "of Reuse and Diffuse neighbouring frames agree, without seams; other VAEs decode frame by frame.",
            inputs=[
                io.Latent.Input("samples", tooltip="The frames of a clip as a batch, from a sampler."),
                io.Vae.Input("vae", tooltip="From Load Temporal VAE, an SVD checkpoint, or any VAE for images."),
                io.Float.Input(
                    "frame_rate", default=8.0, min=0.1, max=240.0, step=0.01, tooltip="Frames per second of the video."
                ),
                *_decode_inputs(),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video",
                    tooltip="All frames, clip after clip, decoded while Save Video writes them; Get Video Components "
                    "makes images of it.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, samples: io.Latent.Type, vae: io.Vae.Type, frame_rate: float, **settings: object
    ) -> io.NodeOutput:
        rate = Fraction(frame_rate).limit_denominator(1001)
        return io.NodeOutput(decode_video(vae, samples, rate, options.decoding(**settings)))


def _decode_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "mode",
            options=options.DECODE_MODES,
            default=options.DECODE_MODES[0],
            tooltip="exact: as if all frames were decoded in one call; waits for all of them. streaming: constant "
            "memory for clips of any length, frames come out as they are made, close to exact (see the help page).",
        ),
        io.Int.Input(
            "chunk_frames",
            default=4,
            min=1,
            max=256,
            tooltip="Most frames worked on at once; fewer where memory is short. The pixels are the same for any.",
        ),
        io.Int.Input(
            "clip_length",
            default=0,
            min=0,
            max=4096,
            tooltip="Frames per clip. 0: the whole batch is one clip. 16 with a batch of 32 makes two clips.",
        ),
    ]


class TemporalVaeEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentMotionTemporalVAEEncode",
            display_name="Temporal VAE Encode",
            category=f"{CATEGORY}/vae",
            description="Encodes a video a few frames at a time, so that it is never in memory as pictures, and the "
            "same way however much memory there is.",
            inputs=[
                io.MultiType.Input("video", types=[io.Image, io.Video], tooltip="A video, or images of a clip."),
                io.Vae.Input("vae", tooltip="The VAE of the model that samples, or one from Load Temporal VAE."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The frames of the clip as a batch.")],
        )

    @classmethod
    def execute(cls, video: object, vae: io.Vae.Type) -> io.NodeOutput:
        return io.NodeOutput(encode_video(vae, video))


NODES: list[type[io.ComfyNode]] = [LoadTemporalVae, TemporalVaeDecode, TemporalVaeEncode]
