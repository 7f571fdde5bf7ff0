"""Files of temporal VAEs: told apart by their tensors, renamed to the names ComfyUI uses, checked whole.

Source of the names: huggingface/diffusers (AutoencoderKLTemporalDecoder, AutoencoderKL), Stability-AI/generative-models
(VideoDecoder) and anonymous0x233/ReuseAndDiffuse (vae_finetuned); file formats only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..animatediff.checkpoint import unwrap
from ..errors import CheckpointError
from .network import STAGES

Shape = tuple[int, ...]
FRONTS = ("first_stage_model.", "vae.")
ATTENTION = {"group_norm": "norm", "to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v",
             "to_out.0": "proj_out", "proj_attn": "proj_out"}  # fmt: skip
TIME_STACK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RENAMED = (
    (re.compile(r"mid_block\.resnets\.(\d+)\."), lambda m: f"mid.block_{int(m[1]) + 1}."),
    (re.compile(r"mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0|query|key|value|proj_attn)\."),
     lambda m: f"mid.attn_1.{ATTENTION[m[1]]}."),
    (re.compile(r"down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsamplers\.0)\."),
     lambda m: f"down.{m[1]}.{'downsample' if m[2] is None else f'block.{m[2]}'}."),
    (re.compile(r"\.spatial_res_block\."), lambda m: "."),
    (re.compile(r"\.temporal_res_block\.(norm1|conv1|norm2|conv2)\."), lambda m: f".time_stack.{TIME_STACK[m[1]]}."),
    (re.compile(r"\.time_mixer\."), lambda m: "."),
    (re.compile(r"\.conv_shortcut\."), lambda m: ".nin_shortcut."),
    (re.compile(r"\.conv_norm_out\."), lambda m: ".norm_out."),
    (re.compile(r"\.time_conv_out\."), lambda m: ".conv_out.time_mix_conv."),
)  # fmt: skip
UP_BLOCK = re.compile(r"up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.|temp_convs\.)")
UP_NAMES = {"resnets.": "block.", "upsamplers.0.": "upsample.", "temp_convs.": "temp_convs."}


class Kind(Enum):
    """Where the temporal layers of a decoder sit."""

    SVD = "Stable Video Diffusion"
    VIDRD = "Reuse and Diffuse"


@dataclass(frozen=True)
class Widths:
    """Sizes of an autoencoder of Stable Diffusion's build. embedding: latent channels, None without 1x1 layers."""

    channels: int
    factors: tuple[int, ...]
    blocks: int
    latent: int
    embedding: int | None


SVD_WIDTHS = Widths(channels=128, factors=(1, 2, 4, 4), blocks=2, latent=4, embedding=None)


@dataclass(frozen=True)
class TemporalVaeFile:
    """A temporal VAE ready to be loaded: its kind, its sizes, its tensors under the names ComfyUI uses."""

    kind: Kind
    widths: Widths
    weights: dict[str, Tensor]


def read_temporal_vae(payload: Mapping[str, Any], name: str) -> TemporalVaeFile:
    """Identify a temporal VAE and return its tensors under the names ComfyUI uses.

    `name` is used in messages. Raises CheckpointError with a sentence for the person who chose the file.
    """
    weights = {key: tensor for key, tensor in _ours(unwrap(payload)).items()
               if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}  # fmt: skip
    kind = _kind_of(weights, name)
    if kind is Kind.SVD:
        weights = _folded(weights, name)
    try:
        widths = _widths_of(weights)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{name}: its decoder is not whole ({error}). Download the file again.") from error
    _check_whole(weights, dict(layout(kind, widths)), name)
    return TemporalVaeFile(kind, widths, weights)


def _ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names ComfyUI uses; those that have them already keep them."""
    for front in FRONTS:
        if any(key.startswith(front) for key in tensors):
            tensors = {key.removeprefix(front): tensor for key, tensor in tensors.items() if key.startswith(front)}
    last = max((int(found[1]) for key in tensors if (found := UP_BLOCK.search(key))), default=0)
    renamed = {}
    for key, tensor in tensors.items():
        new = UP_BLOCK.sub(lambda m: f"up.{last - int(m[1])}.{UP_NAMES[m[2]]}", key)
        for pattern, name in RENAMED:
            new = pattern.sub(name, new)
        is_linear = ".mid.attn_1." in new and new.endswith("weight") and tensor.ndim == 2
        renamed[new] = tensor[..., None, None] if is_linear else tensor
    return renamed


def is_temporal(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a temporal VAE of either kind."""
    return any(key.endswith(".mix_factor") or ".temp_convs." in key for key in tensors if "decoder." in key)


def _kind_of(weights: Mapping[str, Tensor], name: str) -> Kind:
    if is_temporal(weights):
        return Kind.SVD if any(key.endswith(".mix_factor") for key in weights) else Kind.VIDRD
    if "decoder.conv_in.weight" in weights:
        raise CheckpointError(
            f"{name} is a VAE for images: it has no layers over time. Use the Load VAE node for it; "
            "Temporal VAE Decode takes it as well and decodes frame by frame."
        )
    raise CheckpointError(
        f"{name} is not a VAE with a temporal decoder. Choose the VAE of Stable Video Diffusion (the "
        "vae folder of its diffusers release) or the fine-tuned VAE of Reuse and Diffuse."
    )


def _folded(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Without the 1x1 layer behind the encoder, which ComfyUI's model does not have: it goes into the layer before.

    Shapes: quant_conv (2 z, 2 z, 1, 1) times encoder.conv_out (2 z, c, 3, 3).
    """
    rest = {key: tensor for key, tensor in weights.items() if not key.startswith("quant_conv.")}
    try:
        if len(rest) < len(weights):
            matrix = weights["quant_conv.weight"][..., 0, 0].float()
            conv, bias = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
            rest["encoder.conv_out.weight"] = torch.einsum("op,pchw->ochw", matrix, conv.float()).to(conv.dtype)
            rest["encoder.conv_out.bias"] = (matrix @ bias.float() + weights["quant_conv.bias"].float()).to(bias.dtype)
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{name}: quant_conv and encoder.conv_out do not fit; the file is damaged.") from error
    return rest


def _widths_of(weights: Mapping[str, Tensor]) -> Widths:
    channels = int(weights["decoder.conv_out.weight"].shape[1])
    levels = len({key.split(".")[2] for key in weights if key.startswith("decoder.up.")})
    factors = tuple(int(weights[f"decoder.up.{i}.block.0.conv1.weight"].shape[0]) // channels for i in range(levels))
    blocks = len({key.split(".")[4] for key in weights if key.startswith("decoder.up.0.block.")}) - 1
    embedding = weights.get("post_quant_conv.weight")
    return Widths(channels, factors, blocks, int(weights["decoder.conv_in.weight"].shape[1]),
                  None if embedding is None else int(embedding.shape[1]))  # fmt: skip


def layout(kind: Kind, widths: Widths) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of such a VAE."""
    levels = [widths.channels * factor for factor in widths.factors]
    is_svd = kind is Kind.SVD
    yield from _conv("encoder.conv_in", 3, levels[0])
    before = levels[0]
    for i, width in enumerate(levels):
        for j in range(widths.blocks):
            yield from _resnet(f"encoder.down.{i}.block.{j}", before, width)
            before = width
        if i < len(levels) - 1:
            yield from _conv(f"encoder.down.{i}.downsample.conv", width, width)
    yield from _middle("encoder.mid", before, timed=False)
    yield from _norm("encoder.norm_out", before)
    yield from _conv("encoder.conv_out", before, 2 * widths.latent)
    yield from _conv("decoder.conv_in", widths.latent, before)
    yield from _middle("decoder.mid", before, timed=is_svd)
    for i, width in reversed(list(enumerate(levels))):
        for j in range(widths.blocks + 1):
            yield from _resnet(f"decoder.up.{i}.block.{j}", before, width, timed=is_svd)
            before = width
            if not is_svd:
                for stage in range(STAGES):
                    yield from _norm(f"decoder.up.{i}.temp_convs.{j}.convs.{4 * stage}", width)
                    yield from _conv(f"decoder.up.{i}.temp_convs.{j}.convs.{4 * stage + 3}", width, width, (3, 1, 1))
        if i:
            yield from _conv(f"decoder.up.{i}.upsample.conv", width, width)
    yield from _norm("decoder.norm_out", before)
    yield from _conv("decoder.conv_out", before, 3)
    if is_svd:
        yield from _conv("decoder.conv_out.time_mix_conv", 3, 3, (3, 1, 1))
    if widths.embedding is not None:
        yield from _conv("quant_conv", 2 * widths.latent, 2 * widths.embedding, (1, 1))
        yield from _conv("post_quant_conv", widths.embedding, widths.latent, (1, 1))


def _conv(name: str, before: int, after: int, kernel: Shape = (3, 3)) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (after, before, *kernel)
    yield f"{name}.bias", (after,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _resnet(name: str, before: int, after: int, timed: bool = False) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm1", before)
    yield from _conv(f"{name}.conv1", before, after)
    yield from _norm(f"{name}.norm2", after)
    yield from _conv(f"{name}.conv2", after, after)
    if before != after:
        yield from _conv(f"{name}.nin_shortcut", before, after, (1, 1))
    if timed:
        yield f"{name}.mix_factor", (1,)
        for norm, conv in (("in_layers.0", "in_layers.2"), ("out_layers.0", "out_layers.3")):
            yield from _norm(f"{name}.time_stack.{norm}", after)
            yield from _conv(f"{name}.time_stack.{conv}", after, after, (3, 1, 1))


def _middle(name: str, channels: int, timed: bool) -> Iterator[tuple[str, Shape]]:
    yield from _resnet(f"{name}.block_1", channels, channels, timed)
    yield from _norm(f"{name}.attn_1.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{part}", channels, channels, (1, 1))
    yield from _resnet(f"{name}.block_2", channels, channels, timed)


def _check_whole(weights: Mapping[str, Tensor], expected: Mapping[str, Shape], name: str) -> None:
    """Every tensor there, of the right shape and finite; nothing left over."""
    missing = [key for key in expected if key not in weights]
    surplus = [key for key in weights if key not in expected]
    for keys, what in ((missing, "lacks"), (surplus, "has unknown")):
        if keys:
            raise CheckpointError(
                f"{name}: {what} {len(keys)} tensors of a temporal VAE, such as "
                f"{', '.join(keys[:5])}. The file is damaged or of an unknown kind."
            )
    for key, shape in expected.items():
        tensor = weights[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(tensor.shape)} where {shape} is needed; the file is damaged."
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: {key} holds NaN, infinite or whole numbers; download the file again.")
