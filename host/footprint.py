"""Memory of one UNet call from shapes and data type alone: what its layers and the motion modules hold at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import comfy.model_management
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from torch import nn

from ..motion_modules.animatediff.spec import JointNorms

# Temporaries of a feed-forward, in feature maps: two inputs, two norms' outputs, the projection, its halves.
FEED_FORWARD, SLAB_ROWS = 20, 15
QUERY_CHUNKS = (4096, 2048, 1024, 512, 256)  # the host's choice of rows of scores at once, by free memory


@dataclass(frozen=True)
class Shape:
    """One call: images (all frames of all conditionings), latent height and width, bytes of a number, frames a clip."""

    images: int
    height: int
    width: int
    item: int
    frames: int
    slab: int


@dataclass
class Footprint:
    """Largest number of bytes alive at once, weights left out: while layers of the UNet run, and while ours run."""

    unet: int = 0
    motion: int = 0

    @property
    def peak(self) -> int:
        return max(self.unet, self.motion)


@dataclass
class _Walk:
    """A pass through the UNet's layers. channels, scale: of the feature map where the walk is, scale 1: the latent."""

    shape: Shape
    joint: JointNorms
    found: Footprint = field(default_factory=Footprint)
    channels: int = 4
    height: int = 0
    width: int = 0

    def map(self, channels: int) -> int:
        return self.shape.images * channels * self.height * self.width * self.shape.item

    def norm(self, channels: int, joint: bool) -> int:
        """Bytes while a GroupNorm runs; one over all frames keeps float32 copies of smaller types."""
        return self.map(channels) * (1 if not joint else 2 if self.shape.item >= 4 else 6)

    def block(self, layers: Sequence[nn.Module | tuple[int, bool]], base: int) -> int:
        """Walk one block whose input is among the `base` bytes held; bytes of its output."""
        own = 0
        for layer in layers:
            if isinstance(layer, tuple):
                self.found.motion = max(self.found.motion, base + own + self.motion(*layer))
            else:
                self.found.unet = max(self.found.unet, base + own + self.layer(layer))
            own = self.map(self.channels)
        return own

    def layer(self, layer: nn.Module) -> int:
        """Bytes a layer of the UNet makes at most, its output included."""
        if isinstance(layer, ResBlock):
            joint, before, after = self.joint.resnet, self.channels, layer.out_channels
            self.channels = after
            first = max(self.norm(before, joint), 2 * self.map(before), self.map(before) + self.map(after))
            return max(first, self.map(after) + max(self.norm(after, joint), 2 * self.map(after)))
        if isinstance(layer, SpatialTransformer):
            return max(self.attention(layer), FEED_FORWARD * self.map(self.channels))
        if isinstance(layer, Downsample):
            self.height, self.width = math.ceil(self.height / 2), math.ceil(self.width / 2)
        if isinstance(layer, Upsample):
            self.height, self.width = self.height * 2, self.width * 2
            return 2 * self.map(self.channels)
        self.channels = getattr(layer, "out_channels", self.channels)
        return self.map(self.channels)

    def attention(self, layer: SpatialTransformer) -> int:
        """Bytes of self-attention: its inputs, and the scores where the host's attention keeps any."""
        maps = self.map(self.channels)
        if attention.optimized_attention not in (attention.attention_sub_quad, attention.attention_split):
            return 7 * maps
        rows = self.shape.images * layer.transformer_blocks[0].n_heads * self.height * self.width
        free = comfy.model_management.get_free_memory(None)
        chunk = next((x for x in QUERY_CHUNKS if rows * x * 4 * self.shape.item <= free), QUERY_CHUNKS[-2])
        scores = 2 * rows * min(chunk, self.height * self.width) * self.shape.item
        return 8 * maps + scores

    def motion(self, channels: int, joint: bool) -> int:
        """Bytes of one temporal transformer: the normed input, the output, and the temporaries of one slab."""
        shape, places = self.shape, self.height * self.width
        row = max(1, shape.frames) * channels * shape.item
        step = math.ceil(places / math.ceil(places / max(1, shape.slab // (8 * row))))
        return max(self.norm(channels, joint), 2 * self.map(channels) + SLAB_ROWS * step * row)


def footprint(
    unet: UNetModel, slots: Mapping[nn.Module, Sequence[tuple[int, bool]]], joint: JointNorms, shape: Shape
) -> Footprint:
    """Walk the UNet as a call would.

    slots: for blocks of the UNet, the motion modules in them: channels, and whether their norm sees all frames.
    """
    walk = _Walk(shape, joint, height=shape.height, width=shape.width, channels=unet.in_channels)
    latents = 4 * shape.images * unet.in_channels * shape.height * shape.width * 4
    skips: list[tuple[int, int, int, int]] = []
    held = latents
    for block in unet.input_blocks:
        out = walk.block(_layers(block, slots, False), held)
        skips.append((out, walk.channels, walk.height, walk.width))
        held += out
    out = walk.block(_layers(unet.middle_block, slots, True), held)
    for block in unet.output_blocks:
        skip, channels, walk.height, walk.width = skips.pop()
        walk.found.unet = max(walk.found.unet, held + 2 * out + skip)
        held -= skip
        walk.channels += channels
        out = walk.block(_layers(block, slots, False), held + out + skip)
    walk.found.unet = max(walk.found.unet, held + out + max(2 * out, walk.norm(walk.channels, joint.out)))
    return walk.found


def _layers(
    block: nn.Module, slots: Mapping[nn.Module, Sequence[tuple[int, bool]]], middle: bool
) -> list[nn.Module | tuple[int, bool]]:
    layers = list(block)
    place = len(layers) - (1 if middle or isinstance(layers[-1], Upsample) else 0)
    return [*layers[:place], *slots.get(block, ()), *layers[place:]]
