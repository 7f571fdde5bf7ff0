"""The host's decoders as lines of layers, which also say how much memory each takes."""

from __future__ import annotations

from functools import partial

import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Decoder, normal_attention
from comfy.ldm.modules.temporal_ae import AE3DConv, VideoDecoder, VideoResBlock
from torch import nn
from torch.nn import functional

from ..motion_modules.errors import ModelMismatchError
from ..motion_modules.temporal_vae.plan import Plan, Spatial, Stage, Temporal
from .temporal_vae import TemporalConvsDecoder


def plan_of(model: nn.Module | None) -> Plan | None:
    """The layers of a decoder of Stable Diffusion's build in order, temporal or not; None for another build.

    Raises ModelMismatchError for a temporal decoder of another build.
    """
    decoder = getattr(model, "decoder", None)
    if isinstance(decoder, VideoDecoder):
        if decoder.time_mode != "conv-only":
            raise ModelMismatchError(
                "This VAE mixes frames by attention, which Temporal VAE Decode does not know. Use "
                "the VAE Decode node for it."
            )
    elif not isinstance(decoder, TemporalConvsDecoder) and not _is_for_images(decoder):
        return None
    steps: list[Spatial | Temporal] = []
    if hasattr(model, "post_quant_conv"):
        steps.append(_conv(model.post_quant_conv))
    steps += [_conv(decoder.conv_in), *_resnet(decoder.mid.block_1)]
    steps += [_attention(decoder.mid.attn_1), *_resnet(decoder.mid.block_2)]
    for level in reversed(range(decoder.num_resolutions)):
        up = decoder.up[level]
        for number, block in enumerate(up.block):
            steps += _resnet(block)
            steps += [_attention(layer) for layer in list(up.attn)[number : number + 1]]
            if isinstance(decoder, TemporalConvsDecoder):
                stages = tuple(Stage(*pair) for pair in up.temp_convs[number].stages())
                steps.append(Temporal(stages, lambda x: 1.0, on_single=False))
        if level:
            steps.append(_upsample(up.upsample, up.block[-1].out_channels))
    return (*steps, *_end(decoder))


def _is_for_images(decoder: nn.Module | None) -> bool:
    return type(decoder) is Decoder and isinstance(decoder.conv_in, nn.Conv2d)


def _conv(conv: nn.Conv2d) -> Spatial:
    return Spatial(conv, conv.out_channels, lambda pixels: (conv.in_channels + conv.out_channels) * pixels)


def _resnet(block: nn.Module) -> list[Spatial | Temporal]:
    before, after = block.in_channels, block.out_channels
    # Input, normed input and output of the first convolution; or input, output of both branches and their sum.
    most = max(2 * before + after, before + (2 + (before != after)) * after)
    layers = partial(Spatial, channels=after, held=lambda pixels: most * pixels)
    if not isinstance(block, VideoResBlock):
        return [layers(partial(block, temb=None))]
    stack = block.time_stack
    stages = Stage(stack.in_layers[0], stack.in_layers[2]), Stage(stack.out_layers[0], stack.out_layers[3])
    weight = lambda x: block.get_alpha(bs=1).to(x)  # noqa: E731
    return [layers(partial(block, temb=None, skip_video=True)), Temporal(stages, weight)]


def _attention(layer: AttnBlock) -> Spatial:
    """With the host's own attention all scores are there twice; others need copies of what they get."""
    channels, scores = layer.norm.num_channels, getattr(layer, "optimized_attention", None) is normal_attention
    maps = 6 if scores else 10
    return Spatial(layer, channels, lambda pixels: maps * channels * pixels + 2 * scores * pixels**2)


def _upsample(layer: nn.Module, channels: int) -> Spatial:
    return Spatial(layer, channels, lambda pixels: 9 * channels * pixels // 4, scale=2)


def _end(decoder: nn.Module) -> list[Spatial | Temporal]:
    conv, before = decoder.conv_out, decoder.norm_out.num_channels
    timed = isinstance(conv, AE3DConv)
    last = partial(conv, skip_video=True) if timed else conv

    def finish(x: torch.Tensor) -> torch.Tensor:
        return last(functional.silu(decoder.norm_out(x), inplace=True))

    channels = conv.out_channels
    steps: list[Spatial | Temporal] = [Spatial(finish, channels, lambda pixels: (2 * before + channels) * pixels)]
    return [*steps, Temporal((Stage(None, conv.time_mix_conv),))] if timed else steps
