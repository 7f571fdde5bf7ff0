"""VAEs with temporal decoders and seeded weights, at any width."""

from __future__ import annotations

import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from torch import Tensor

from ..host import temporal_vae
from ..motion_modules.temporal_vae.checkpoint import SVD_WIDTHS, Kind, TemporalVaeFile, Widths, layout

THIN = Widths(channels=32, factors=(1, 1, 1, 1), blocks=1, latent=4, embedding=4)


def seeded_weights(kind: Kind, widths: Widths, seed: int = 0, spread: float = 0.1) -> dict[str, Tensor]:
    """Every tensor under the host's names, float32, activations finite. spread: deviation of biases and of norms."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in layout(kind, widths):
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise * noise[0].numel() ** -0.5
        else:
            weights[name] = spread * noise + float(name.endswith("weight"))
    return weights


def svd_network(widths: Widths) -> AutoencodingEngine:
    """What the host builds for Stable Video Diffusion's VAE, at any width, weights not set."""
    settings = temporal_vae.decoder_settings(widths)
    timed, place = settings | {"video_kernel_size": [3, 1, 1], "alpha": 0.0}, "comfy.ldm.modules."
    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{place}diffusionmodules.model.Encoder", "params": settings},
        decoder_config={"target": f"{place}temporal_ae.VideoDecoder", "params": timed},
    ).eval()


def seeded_vae(kind: Kind, widths: Widths = SVD_WIDTHS) -> comfy.sd.VAE:
    """A VAE of the host with one of the temporal decoders."""
    weights = seeded_weights(kind, widths)
    if kind is not Kind.SVD or widths == SVD_WIDTHS:
        return temporal_vae.build(TemporalVaeFile(kind, widths, weights))
    # The host's loader makes SVD's decoder in the published widths only, its classes in any.
    network = svd_network(widths)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    settings = temporal_vae.decoder_settings(widths)
    vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": settings, "embed_dim": widths.embedding}})
    vae.first_stage_model = network.to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.device, vae.patcher.offload_device)
    return vae
