"""Small random VAEs of the host with temporal decoders, for the tests of decoding."""

from __future__ import annotations

import comfy.model_patcher
import comfy.sd
import tiny_host
import torch
from latentmotion.bench.vaes import THIN, seeded_weights, svd_network
from latentmotion.host import temporal_vae
from latentmotion.motion_modules.temporal_vae.checkpoint import Kind, TemporalVaeFile, Widths
from torch import Tensor

TINY = THIN


def clip(frames: int, seed: int = 0, height: int = 3, width: int = 2) -> Tensor:
    """Latents (frames, 4, height, width) that change slowly and have no mean in common."""
    noise = torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(0) / torch.arange(1, frames + 1)[:, None, None, None].sqrt()


def random_weights(kind: Kind, widths: Widths, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a temporal VAE under the host's names, float32."""
    return seeded_weights(kind, widths, seed, spread=0.3)


def svd_vae(seed: int = 0, dtype: torch.dtype | None = None) -> comfy.sd.VAE:
    """A VAE as the host makes it of an SVD checkpoint, but small."""
    with torch.inference_mode(False):
        vae = image_vae(dtype=dtype)
        network = tiny_host.randomize(svd_network(TINY), seed).to(vae.vae_dtype)
        vae.first_stage_model = network
        vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.device, vae.patcher.offload_device)
    return vae


def vidrd_vae(seed: int = 0) -> comfy.sd.VAE:
    """A VAE of Reuse and Diffuse's layout, through the pack's loader."""
    with torch.inference_mode(False):
        return temporal_vae.build(TemporalVaeFile(Kind.VIDRD, TINY, random_weights(Kind.VIDRD, TINY, seed)))


def image_vae(seed: int = 0, dtype: torch.dtype | None = None) -> comfy.sd.VAE:
    """A VAE for images, which decodes frame by frame."""
    config = {"params": {"ddconfig": temporal_vae.decoder_settings(TINY), "embed_dim": 4}}
    with torch.inference_mode(False):
        vae = comfy.sd.VAE(sd={}, config=config, dtype=dtype)
        tiny_host.randomize(vae.first_stage_model, seed)
    return vae


def whole(vae: comfy.sd.VAE, latent: Tensor) -> Tensor:
    """One call of the host's own decoder on all frames: (f, H, W, 3) in [0, 1]."""
    pixels = vae.first_stage_model.decode(latent.to(vae.vae_dtype)).float()
    return vae.process_output(pixels).movedim(1, -1)
