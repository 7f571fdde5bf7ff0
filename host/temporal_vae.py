"""Files of temporal VAEs that the host's own loader does not know, as VAEs of the host."""

from __future__ import annotations

from typing import Any

import comfy.ops
import comfy.sd
from comfy.ldm.modules.diffusionmodules.model import Decoder
from torch import Tensor, nn

from ..motion_modules.errors import CheckpointError
from ..motion_modules.files import read_weights
from ..motion_modules.temporal_vae.checkpoint import SVD_WIDTHS, Kind, TemporalVaeFile, Widths, read_temporal_vae
from ..motion_modules.temporal_vae.network import TemporalConvs
from . import paths


class TemporalConvsDecoder(Decoder):
    """The host's decoder with Reuse and Diffuse's layers behind every residual block on the way up.

    As in the host's decoder for Stable Video Diffusion, the images of a call are the frames of one clip.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for up in self.up:
            layers = [TemporalConvs(block.out_channels, comfy.ops.disable_weight_init) for block in up.block]
            up.temp_convs = nn.ModuleList(layers)

    def forward(self, z: Tensor) -> Tensor:
        """Shapes: z (f, c, h, w) -> (f, 3, H, W)."""
        h = self.mid.block_1(self.conv_in(z), None)
        h = self.mid.block_2(self.mid.attn_1(h), None)
        for level in reversed(range(self.num_resolutions)):
            up = self.up[level]
            for block, over_time in zip(up.block, up.temp_convs, strict=True):
                h = over_time(block(h, None))
            if level:
                h = up.upsample(h)
        return self.conv_out(nn.functional.silu(self.norm_out(h)))


def load_temporal_vae(name: str) -> comfy.sd.VAE:
    """Load a file of the vae folder. Raises CheckpointError with a sentence for the user."""
    path = paths.locate(paths.VAES, name)
    return build(read_temporal_vae(read_weights(path), name))


def build(file: TemporalVaeFile) -> comfy.sd.VAE:
    """A VAE of the host, on the devices and in the type the host chooses.

    Raises CheckpointError for an SVD decoder of other widths than the published ones: the host builds no other.
    """
    if file.kind is Kind.SVD:
        if file.widths != SVD_WIDTHS:
            raise CheckpointError(
                "This file has the layers of Stable Video Diffusion's VAE in other widths "
                f"({file.widths.channels} x {file.widths.factors}), which ComfyUI cannot build. "
                "Choose the published VAE."
            )
        return comfy.sd.VAE(sd=dict(file.weights))
    settings = decoder_settings(file.widths)
    vae = comfy.sd.VAE(sd=dict(file.weights),
                       config={"params": {"ddconfig": settings, "embed_dim": file.widths.embedding}})  # fmt: skip
    decoder = TemporalConvsDecoder(**settings)
    front = "decoder."
    own = {key.removeprefix(front): tensor for key, tensor in file.weights.items() if key.startswith(front)}
    decoder.load_state_dict(own)
    vae.first_stage_model.decoder = decoder.to(vae.vae_dtype).eval()
    vae.size = None
    vae.model_size()
    return vae


def decoder_settings(widths: Widths) -> dict[str, Any]:
    """Sizes as the host's autoencoder classes take them."""
    return {"double_z": True, "z_channels": widths.latent, "resolution": 256, "in_channels": 3, "out_ch": 3,
            "ch": widths.channels, "ch_mult": list(widths.factors), "num_res_blocks": widths.blocks,
            "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
