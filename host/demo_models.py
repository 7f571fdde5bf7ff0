"""The demo networks, built from the host's own classes, and wrapped as ordinary MODEL, CLIP and VAE."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.cldm.cldm
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..demo import config
from ..motion_modules.animatediff.network import MotionModel
from ..motion_modules.animatediff.spec import V2, MotionSpec
from ..motion_modules.call import MotionCall
from ..training.checkpoint import load_weights, read_recipe
from .unet import CALLS, MotionSlot, block_of, inflated, place_frames

TABLE = "text_model.embeddings.token_embedding.weight"


class ToyConfig(comfy.supported_models.SD15):
    """SD1.5 in everything but its widths."""

    unet_extra_config = {"num_heads": config.UNET_HEADS, "num_head_channels": -1}


class ToyTextEncoder(comfy.sd1_clip.SDClipModel):
    """The host's CLIP text encoder at the demo's width."""

    def __init__(
        self, device: str = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(config.CLIP),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class ToyClip(comfy.sd1_clip.SD1ClipModel):
    """What the host's CLIP holds: one text encoder under the name `clip_l`."""

    def __init__(
        self, device: str = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=ToyTextEncoder)


def build_vae() -> AutoencoderKL:
    """The autoencoder, its weights not set, float32."""
    return AutoencoderKL(ddconfig=config.VAE, embed_dim=config.VAE["z_channels"])


def build_unet() -> UNetModel:
    """The UNet, its weights not set, float32."""
    settings = ToyConfig(config.UNET).unet_config
    return UNetModel(**settings, dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def build_controlnet(unet_weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A ControlNet whose encoder has the UNet's weights, built from them as the host's loader will build it from its
    file; its other weights are not set. float32."""
    parts = ("input_blocks.", "middle_block.", "time_embed.")
    encoder = {key: tensor.float() for key, tensor in unet_weights.items() if key.startswith(parts)}
    settings = comfy.model_detection.model_config_from_unet(dict(encoder), "", True).unet_config
    settings.pop("out_channels")
    ops = comfy.ops.disable_weight_init
    network = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3, dtype=torch.float32, operations=ops)
    network.load_state_dict(encoder, strict=False)
    return network


def build_text_encoder() -> torch.nn.Module:
    """The text model of the CLIP class with its whole vocabulary, its weights not set, float32."""
    options = {"custom_operations": comfy.ops.disable_weight_init}
    encoder = ToyTextEncoder(dtype=torch.float32, model_options=options).transformer
    return encoder.requires_grad_(True)


def tokenizer() -> Callable[[str], list[int]]:
    """A function from text to the host's CLIP tokens, without start, end and padding."""
    clip = comfy.sd1_clip.SD1Tokenizer()

    def tokenize(text: str) -> list[int]:
        tokens = [token for token, _ in clip.tokenize_with_weights(text)["l"][0]]
        return tokens[1 : tokens.index(49407)]

    return tokenize


def load_vae(folder: Path = config.WEIGHTS) -> comfy.sd.VAE:
    """The demo autoencoder as a VAE of the host."""
    settings = {"params": {"ddconfig": config.VAE, "embed_dim": config.VAE["z_channels"]}}
    return comfy.sd.VAE(sd=load_weights(_present(folder / config.VAE_FILE)), config=settings)


def load_clip(folder: Path = config.WEIGHTS) -> comfy.sd.CLIP:
    """The demo text encoder as a CLIP of the host.

    The file has a row of the token table for each token of the captions, listed in its recipe, and one more, which
    every other token of the vocabulary gets.
    """
    path = _present(folder / config.CLIP_FILE)
    weights = load_weights(path)
    rows = weights[TABLE]
    table = rows[-1].repeat(config.CLIP["vocab_size"], 1)
    table[read_recipe(path)["tokens"]] = rows[:-1]
    weights[TABLE] = table
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, ToyClip))
    named = {f"clip_l.transformer.{name}": tensor for name, tensor in weights.items()}
    missing, _ = clip.load_sd(named, full_model=True)
    _refuse(path, [name for name in missing if "logit_scale" not in name])
    return clip


def load_unet(folder: Path = config.WEIGHTS) -> comfy.model_patcher.ModelPatcher:
    """The demo UNet as a MODEL of the host, on the devices and in the type the host chooses."""
    path = _present(folder / config.UNET_FILE)
    weights = load_weights(path)
    management = comfy.model_management
    settings = ToyConfig(config.UNET)
    dtype = management.unet_dtype(model_params=sum(t.numel() for t in weights.values()))
    device = management.get_torch_device()
    settings.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device))
    model = settings.get_model({}, device=management.unet_offload_device())
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    _refuse(path, [*missing, *unexpected])
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. It comes with the pack: get it again with git checkout "
                                "demo/weights in the pack's folder, or install the pack anew.")
    return path


def _refuse(path: Path, names: list[str]) -> None:
    if names:
        raise ValueError(f"{path} does not belong to this version of the pack: {names[0]} does not match. "
                         "Get it again with git checkout demo/weights in the pack's folder, or install the pack anew.")


def adapter_layers() -> dict[str, str]:
    """The UNet's attention projections: published name (diffusers layout, without `.weight`) to the host's name."""
    names = comfy.utils.unet_to_diffusers(ToyConfig(config.UNET).unet_config)
    projections = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)\.weight$")
    return {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in names.items() if projections.search(k)}


def motion_spec() -> MotionSpec:
    """The layout of the demo's motion module: a temporal transformer behind every layer of its UNet, as in v2."""
    widths = [config.UNET["model_channels"] * factor for factor in config.UNET["channel_mult"]]
    blocks = config.UNET["num_res_blocks"]
    slots = [(f"down_blocks.{i}.motion_modules.{j}", widths[i]) for i in range(len(widths)) for j in range(blocks[i])]
    for i, (width, count) in enumerate(zip(reversed(widths), reversed(blocks), strict=True)):
        slots += [(f"up_blocks.{i}.motion_modules.{j}", width) for j in range(count + 1)]
    slots.append(("mid_block.motion_modules.0", widths[-1]))
    return MotionSpec(V2, tuple(slots), positions=config.MOTION_POSITIONS)


@contextmanager
def motion_in_place(unet: UNetModel, motion: MotionModel, frames: int,
                    attention: Callable) -> Iterator[Callable[[torch.Tensor], dict]]:  # fmt: skip
    """While the context lasts `unet` makes video. Yields a function: places in time of the frames that the next calls
    are of, (f,), to the transformer options they need."""
    device = next(motion.parameters()).device
    positions = torch.arange(frames, dtype=torch.float32, device=device)
    call = MotionCall(frames=frames, positions=positions, attention=attention)
    slots = [(block_of(unet, motion.spec, name), MotionSlot(transformer, call))
             for name, transformer in motion.transformers().items()]
    options = {CALLS: {0: call}}

    def place(positions: torch.Tensor) -> dict:
        place_frames(unet, options, positions)
        return options

    with inflated(unet, slots, [], frames):
        yield place
