"""Files of networks tuned on one clip: the release's whole UNets, and differences to a named image model.

Source of the names: showlab/Tune-A-Video's diffusers folders (file format only).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..animatediff.checkpoint import unwrap
from ..errors import CheckpointError
from .network import Slots, temporal_shapes

SLOT_KEY = re.compile(
    r"^((?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+)\.((?:attn|norm)_temp\..+)$"
)
QUERIES = ("attn1.to_q", "attn2.to_q")
DIFFERENCE, WEIGHT = ".diff", ".weight"
BASE = "base"  # in the metadata of a file of differences
NOT_THE_UNET = ("vae.", "text_encoder.", "safety_checker.", "image_encoder.")
# Weights that tuning leaves alone and other training changes; the first numbers of each tell image models apart.
FROZEN, TAKEN = ("attn1.to_k.weight", "attn2.to_v.weight"), 2


@dataclass(frozen=True)
class Base:
    """An image model, told by a few of its frozen numbers, which stay the same in any number format up to rounding.

    dtype: the format they were read in.
    """

    name: str
    numbers: tuple[float, ...]
    dtype: str = "float32"

    def is_same(self, other: Base) -> bool:
        """Whether the numbers are the same up to the rounding of the coarser format."""
        kinds = [torch.finfo(getattr(torch, base.dtype)) for base in (self, other)]
        eps, least = max(kind.eps for kind in kinds), max(kind.smallest_normal * kind.eps for kind in kinds)
        return len(self.numbers) == len(other.numbers) and all(
            abs(a - b) <= eps * max(abs(a), abs(b)) + least for a, b in zip(self.numbers, other.numbers, strict=True)
        )


@dataclass(frozen=True)
class TunedFile:
    """A tuned network ready to be put on an image model. All names are the release's.

    slots: transformer blocks with their channels. heads: of each where the file's folder says so.
    temporal: T-Attn, norms included. changes: differences of the query projections. weights: of the whole UNet
    instead, where the file has it, T-Attn left out. base: what the differences are to.
    """

    name: str
    slots: Slots
    temporal: dict[str, Tensor]
    changes: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    base: Base | None = None
    heads: tuple[int, ...] = ()


def identify(slots: Slots, weight_of: Callable[[str], Tensor], name: str) -> Base:
    """Tell an image model by its numbers. weight_of: a weight by its name in the release."""
    taken = [weight_of(f"{slot}.{part}").flatten()[:TAKEN] for slot, _ in slots for part in FROZEN]
    numbers = tuple(float(number) for values in taken for number in values)
    return Base(name, numbers, str(taken[0].dtype).removeprefix("torch."))


def portable(temporal: Mapping[str, Tensor], changes: Mapping[str, Tensor], base: Base) -> tuple[dict, dict]:
    """Tensors and metadata of a file of differences.

    temporal: T-Attn by the release's names; its norms are not trained, and are left out as long as they are 1 and 0.
    changes: tuned minus base of `...attn1.to_q.weight` and `...attn2.to_q.weight`.
    """
    tensors = {
        name: tensor
        for name, tensor in temporal.items()
        if ".norm_temp." not in name or bool((tensor != float(name.endswith(WEIGHT))).any())
    }
    tensors |= {name.removesuffix(WEIGHT) + DIFFERENCE: tensor for name, tensor in changes.items()}
    return tensors, {BASE: json.dumps(asdict(base))}


def read_tuned(
    payload: Mapping[str, Any], metadata: Mapping[str, str], name: str, config: Mapping[str, Any] | None = None
) -> TunedFile:
    """Identify a tuned network. config: the release's `config.json` where there is one beside the file.

    Raises CheckpointError with a sentence for the person who chose the file.
    """
    tensors = {key: tensor for key, tensor in unwrap(payload).items() if not key.startswith(NOT_THE_UNET)}
    refuse_other_files(tensors, name)
    temporal = {key: tensor for key, tensor in tensors.items() if SLOT_KEY.match(key)}
    slots = _slots_of(temporal, name)
    for key, shape in temporal_shapes(slots).items():
        if ".norm_temp." in key and key not in temporal:
            temporal[key] = torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    rest = {key: tensor for key, tensor in tensors.items() if key not in temporal}
    is_portable = any(key.endswith(DIFFERENCE) for key in rest)
    ending = DIFFERENCE if is_portable else WEIGHT
    queries = {f"{slot}.{part}{ending}": (c, c) for slot, c in slots for part in QUERIES}
    _check(temporal, temporal_shapes(slots), name)
    _check(rest, queries, name, others=not is_portable)
    heads = _heads_of(config, slots, name)
    if not is_portable:
        return TunedFile(name, slots, temporal, weights=rest, heads=heads)
    changes = {key.removesuffix(DIFFERENCE) + WEIGHT: tensor for key, tensor in rest.items()}
    return TunedFile(name, slots, temporal, changes, base=_base_of(metadata, slots, name), heads=heads)


def _slots_of(temporal: Mapping[str, Tensor], name: str) -> tuple[tuple[str, int], ...]:
    found = {}
    for key, tensor in temporal.items():
        slot, rest = SLOT_KEY.match(key).groups()
        if rest == "attn_temp.to_q.weight" and tensor.ndim == 2:
            found[slot] = int(tensor.shape[0])
    if not found:
        raise CheckpointError(f"{name}: has tensors of temporal attention, but no complete block; the file is damaged.")
    return tuple(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(slot: str) -> tuple[int, ...]:
    side = ("down_blocks", "mid_block", "up_blocks").index(slot.split(".")[0])
    return (side, *(int(part) for part in slot.split(".") if part.isdigit()))


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple], name: str, others: bool = False) -> None:
    """Every expected tensor there, of its shape; floating point and finite. others: whether there may be more."""
    missing = [key for key in expected if key not in tensors]
    surplus = [] if others else [key for key in tensors if key not in expected]
    for keys, what in ((missing, "lacks"), (surplus, "has unknown")):
        if keys:
            raise CheckpointError(
                f"{name}: {what} {len(keys)} tensors of a tuned video model, such as {', '.join(keys[:3])}. The file "
                "is damaged or of an unknown kind."
            )
    for key, tensor in tensors.items():
        if key in expected and tuple(tensor.shape) != tuple(expected[key]):
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(tensor.shape)} where {tuple(expected[key])} is needed; the file is "
                "damaged."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name}: {key} holds {tensor.dtype} numbers; weights must be floating point.")
        if not torch.isfinite(tensor if tensor.element_size() > 1 else tensor.half()).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinite values; download or tune the file again.")


def _base_of(metadata: Mapping[str, str], slots: Slots, name: str) -> Base:
    try:
        said = json.loads(metadata[BASE])
        base = Base(str(said["name"]), tuple(float(number) for number in said["numbers"]), str(said["dtype"]))
        torch.finfo(getattr(torch, base.dtype))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} holds differences to an image model and does not say to which one. Its metadata was lost, "
            "perhaps when another program wrote it anew: take the original file, or tune again."
        ) from error
    if len(base.numbers) != len(slots) * len(FROZEN) * TAKEN:
        raise CheckpointError(f"{name}: what it says of its image model does not fit its layers; the file is damaged.")
    return base


def _heads_of(config: Mapping[str, Any] | None, slots: Slots, name: str) -> tuple[int, ...]:
    """Attention heads of each slot; the release's configuration calls their number `attention_head_dim`."""
    said = (config or {}).get("attention_head_dim")
    if said is None:
        return ()
    levels = list(said) if isinstance(said, Sequence) else [said]
    try:
        return tuple(_level(levels, slot) for slot, _ in slots)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The config.json beside {name} has an attention_head_dim that fits no UNet: {said}. Take the file that "
            "was saved together with the weights."
        ) from error


def _level(levels: list[Any], slot: str) -> int:
    side, number, *_ = slot.split(".")
    if len(levels) == 1 or side == "mid_block":
        return int(levels[-1])
    return int(levels[int(number)] if side == "down_blocks" else levels[::-1][int(number)])


Test = Callable[[Mapping[str, Tensor]], bool]


def _any(part: str) -> Test:
    return lambda tensors: any(part in key for key in tensors)


def _kinds() -> Iterator[tuple[Test, str]]:
    yield lambda t: not t, "holds no tensors at all. Choose a file that Tune-A-Video or Tune Video Model has written."
    yield _any(".temp_attentions."), ("is a text-to-video UNet of the ModelScope kind, which is another network; it is "
                                      "not supported.")  # fmt: skip
    yield (
        (lambda t: _any("motion_modules.")(t) and _any("lora")(t)),
        "is a MotionLoRA. Load it with Load MotionLoRA.",
    )
    yield _any("motion_modules."), "is a motion module. Load it with Load Motion Module."
    yield _any("lora"), "is a LoRA. Move it to models/loras and use the Load LoRA node for it."
    yield _any("model.diffusion_model."), "is a whole image checkpoint. Load it with Load Checkpoint."
    yield (
        (lambda t: _any(".attentions.")(t) and not _any(".attn_temp.")(t)),
        ("is a UNet for images: it has no attention over frames. Choose a file that Tune-A-Video has written."),
    )
    yield (
        (lambda t: not any(SLOT_KEY.match(key) for key in t)),
        (
            "holds no tuned video model. Choose unet/diffusion_pytorch_model of a Tune-A-Video folder, or a file that "
            "Tune Video Model has written."
        ),
    )


def refuse_other_files(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise a CheckpointError that says what the file is, if it is anything but a tuned network."""
    for test, sentence in _kinds():
        if test(tensors):
            raise CheckpointError(f"{name} {sentence}")
