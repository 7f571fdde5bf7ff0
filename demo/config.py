"""Shapes of the demo networks, and where their files lie."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
VAE_FILE = "vae/latentmotion_toy_vae.safetensors"
UNET_FILE = "diffusion_models/latentmotion_toy_unet.safetensors"
CLIP_FILE = "text_encoders/latentmotion_toy_clip.safetensors"
ADAPTER_FILE = "loras/latentmotion_toy_adapter.safetensors"
MOTION_FILE = "animatediff_models/latentmotion_toy_motion.safetensors"
CONTROL_FILE = "controlnet/latentmotion_toy_controlnet.safetensors"
ZOOM_IN_FILE = "animatediff_motion_lora/latentmotion_toy_zoom_in.safetensors"
ZOOM_OUT_FILE = "animatediff_motion_lora/latentmotion_toy_zoom_out.safetensors"

VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 96,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 0,
    "attn_resolutions": [],
    "dropout": 0.0,
}
"""Layout of the host's AutoencoderKL: 8 x 8 pixels to one latent of four channels.

The host's norms have 32 groups. With one or two channels to a group they wipe out what a flat picture's colour is;
with three, constants beside the colour keep it. Hence few layers, and wide ones.
"""

SCALE_FACTOR = 0.18215  # of the host's SD1.5 latent format

TEXT_WIDTH = 128
CLIP = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
"""Layout of the host's CLIP text class, in the terms of its own configuration file."""

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": TEXT_WIDTH,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
UNET_HEADS = 2

MOTION_POSITIONS = 32
ADAPTER_RANK = 32
MOTION_LORA_RANK = 48
