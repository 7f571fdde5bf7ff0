"""What is known of a motion module once its tensors have been looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

SLOT = re.compile(r"^(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?motion_modules\.(\d+)$")

SD15_LEVELS = (320, 640, 1280, 1280)
SDXL_LEVELS = (320, 640, 1280)
DEMO_LEVELS = 64, 128  # of the pack's own
DEMO = "the demo's image model"


class Schedule(str, Enum):
    """Noise schedules of the published modules, in the words of the field (diffusers' names)."""

    SCALED_LINEAR = "scaled linear (Stable Diffusion)"
    LINEAR = "linear (AnimateDiff)"
    SCALED_LINEAR_SDXL = "scaled linear to 0.020 (AnimateDiff-SDXL)"


@dataclass(frozen=True)
class JointNorms:
    """Which GroupNorms take one mean and variance over all frames of a clip instead of one per frame."""

    resnet: bool = False
    out: bool = False
    transformer: bool = False
    motion: bool = False


EVERY_NORM = JointNorms(resnet=True, out=True, transformer=True, motion=True)


@dataclass(frozen=True)
class Variant:
    """A published training form: how its authors compute, whatever the widths of the network.

    positions: frames on its time axis where the file does not say.
    Source: reference implementations of each variant; the image models they were trained on.
    """

    name: str
    joint: JointNorms = JointNorms()
    joint_as_evolved: JointNorms = JointNorms()
    schedule: Schedule | None = None
    positions: int = 32


V1 = Variant("AnimateDiff v1", JointNorms(resnet=True, out=True), EVERY_NORM, Schedule.LINEAR, positions=24)
V2 = Variant("AnimateDiff v2", schedule=Schedule.LINEAR)
V3 = Variant("AnimateDiff v3", schedule=Schedule.LINEAR)
SDXL_BETA = Variant("AnimateDiff SDXL beta", JointNorms(motion=True), EVERY_NORM, Schedule.SCALED_LINEAR_SDXL)
HOTSHOT_XL = Variant("HotshotXL", JointNorms(resnet=True, out=True), EVERY_NORM, None, positions=24)
CONVOLUTION = Variant("temporal convolution", schedule=Schedule.LINEAR)
ANIMATE_LCM = Variant("AnimateLCM", schedule=Schedule.LINEAR, positions=64)


@dataclass(frozen=True)
class MotionSpec:
    """The layout of one motion module, read from its tensors.

    slots: (published name such as `down_blocks.0.motion_modules.1`, channels) in the order of the file's layout.
    positions: frames the module was built for. attentions: of each block, 0 for convolutions over frames.
    """

    variant: Variant
    slots: tuple[tuple[str, int], ...]
    positions: int
    heads: int = 8
    groups: int = 32
    attentions: int = 2

    def per_block(self, side: str) -> dict[int, list[int]]:
        """Channels of the slots of `down_blocks` or `up_blocks`, by block."""
        blocks: dict[int, list[int]] = {}
        for name, channels in self.slots:
            found = SLOT.match(name)
            if found[1] == side:
                blocks.setdefault(int(found[2]), []).append(channels)
        return blocks

    @property
    def has_mid(self) -> bool:
        return any(name.startswith("mid_block.") for name, _ in self.slots)

    @property
    def levels(self) -> tuple[int, ...]:
        """Channels of each resolution, finest first."""
        return tuple(widths[0] for _, widths in sorted(self.per_block("down_blocks").items()))

    @property
    def family(self) -> str:
        """The image model this module belongs to, in words."""
        return family_of(self.levels, max(map(len, self.per_block("down_blocks").values()), default=0))


def family_of(levels: tuple[int, ...], layers: int) -> str:
    """Name the image model whose UNet has these widths, finest level first, and so many layers on each."""
    known = {(SD15_LEVELS, 2): "SD1.x / SD2.x", (SDXL_LEVELS, 2): "SDXL", (DEMO_LEVELS, 1): DEMO}
    widths = ", ".join(map(str, levels))
    return known.get((levels, layers), f"a UNet of widths {widths} with {layers} layer{'s' * (layers > 1)} each")
