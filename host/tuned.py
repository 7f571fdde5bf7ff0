"""A network tuned on one clip, on a MODEL: T-Attn in its transformer blocks, and the changes of its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..motion_modules.call import MotionCall
from ..motion_modules.errors import CheckpointError, ModelMismatchError
from ..motion_modules.files import read_metadata, read_weights
from ..motion_modules.tune_a_video.checkpoint import QUERIES, Base, TunedFile, identify, read_tuned
from ..motion_modules.tune_a_video.network import Slots, TemporalLayer, TunedModel
from . import memory, paths
from .attention import TUNED as KEY
from .attention import Extent, FrameAttention, apply_frame_attention, check_image_unet, clip_frames, install, stand_ins
from .motion import FLOAT8
from .unet import family

UNET = "diffusion_model."
log = logging.getLogger(__name__)


def load_tuned_model(model: ModelPatcher, name: str, strength: float = 1.0, frames: int = 0) -> ModelPatcher:
    """Put a file of the animatediff_models folder on a MODEL. Raises CheckpointError and ModelMismatchError."""
    path = paths.locate(paths.MOTION_MODULES, name)
    file = read_tuned(read_weights(path), read_metadata(path), name, _config_beside(path))
    return apply_tuned(model, file, strength, frames)


def _config_beside(path: Path) -> dict[str, Any] | None:
    config = path.with_name("config.json")
    try:
        return json.loads(config.read_text("utf-8")) if config.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} cannot be read ({error}). It belongs to {path.name}: take it from where that "
                              "came from, or remove it.") from error  # fmt: skip


def apply_tuned(model: ModelPatcher, file: TunedFile, strength: float = 1.0, frames: int = 0) -> ModelPatcher:
    """Return a clone of MODEL that is the tuned network: ST-Attention, T-Attn and the changed weights.

    strength: share of what was tuned. frames: per clip, 0 for the whole batch.
    Raises ModelMismatchError when the file does not belong to this MODEL, saying what both are.
    """
    unet = model.get_model_object("diffusion_model")
    check_image_unet(unet, file.name)
    if model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        raise ModelMismatchError("This MODEL is a tuned video model already. Connect the image model from before Load "
                                 "Tuned Video Model.")  # fmt: skip
    places = places_of(model)
    _check_fit(model, places, file)
    changes = file.changes or dict(_changes(model, file))
    _check_base(model, file)
    names = names_of(model)
    heads = tuple(unet.get_submodule(places[slot]).n_heads for slot, _ in file.slots)
    patcher = manage(file.slots, heads, file.temporal)
    model = apply_frame_attention(model, FrameAttention(frames=frames))
    model.set_attachments(KEY, {"frames": frames})
    model.add_patches({UNET + names[key]: ("diff", (change,)) for key, change in changes.items()}, strength)
    if strength:
        install(model, KEY, TemporalAttention(patcher, places, strength), Extent())
        model.set_additional_models(KEY, [patcher])
    return model


def manage(slots: Slots, heads: Sequence[int], weights: Mapping[str, Tensor]) -> ModelPatcher:
    """T-Attn of these weights as a model that the host manages."""
    device = comfy.model_management.get_torch_device()
    dtype = max((tensor.dtype for tensor in weights.values()), key=lambda kind: kind.itemsize)
    if dtype not in FLOAT8:
        count = sum(tensor.numel() for tensor in weights.values())
        dtype = comfy.model_management.unet_dtype(device=device, model_params=count, weight_dtype=dtype)
    offload = comfy.model_management.unet_offload_device()
    network = TunedModel(slots, heads, comfy.ops.manual_cast, dtype=dtype, device=offload)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    return ModelPatcher(network, load_device=device, offload_device=offload)


def names_of(model: ModelPatcher) -> dict[str, str]:
    """The host's name of every weight of the UNet, by its name in the release."""
    return comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)


def places_of(model: ModelPatcher) -> dict[str, str]:
    """Where the host's UNet has each transformer block, by the block's name in the release."""
    ending = f".{QUERIES[0]}.weight"
    return {theirs.removesuffix(ending): ours.removesuffix(ending) for theirs, ours in names_of(model).items()
            if theirs.endswith(ending)}  # fmt: skip


def slots_of(model: ModelPatcher) -> Slots:
    """Transformer blocks of the MODEL and their channels, as a tuned network has them."""
    unet = model.get_model_object("diffusion_model")
    return tuple((slot, unet.get_submodule(place).norm1.weight.shape[0]) for slot, place in places_of(model).items())


def original_weight(model: ModelPatcher) -> Callable[[str], Tensor]:
    """A weight of the MODEL's UNet as it was loaded, LoRAs left out, by its name in the release."""
    names, patches = names_of(model), model.get_key_patches(UNET)

    def weight_of(name: str) -> Tensor:
        weight, convert = patches[UNET + names[name]][0]
        return convert(weight, inplace=False)

    return weight_of


def base_of(model: ModelPatcher, name: str) -> Base:
    """The image model that a MODEL was loaded as."""
    return identify(slots_of(model), original_weight(model), name)


def _check_fit(model: ModelPatcher, places: dict[str, str], file: TunedFile) -> None:
    unet, own = model.get_model_object("diffusion_model"), dict(slots_of(model))
    if own != dict(file.slots):
        widths = sorted({channels for _, channels in file.slots})
        raise ModelMismatchError(f"{file.name} was tuned on a UNet with {len(file.slots)} transformer blocks of widths "
                                 f"{', '.join(map(str, widths))}, and this MODEL is {family(unet)} with {len(own)} of "
                                 f"widths {', '.join(map(str, sorted(set(own.values()))))}. Load the image model it "
                                 "was tuned on.")  # fmt: skip
    for (slot, _), heads in zip(file.slots, file.heads, strict=False):
        block = unet.get_submodule(places[slot])
        if block.n_heads != heads:
            raise ModelMismatchError(f"{file.name} has {heads} attention heads in {slot}, and this MODEL has "
                                     f"{block.n_heads}. Load the image model it was tuned on.")  # fmt: skip


def _check_base(model: ModelPatcher, file: TunedFile) -> None:
    if file.base is not None and not file.base.is_same(base_of(model, "")):
        name = file.base.name
        base, wanted = (f"the image model {name}", name) if name else ("an image model", "the one it was tuned on")
        raise ModelMismatchError(f"{file.name} holds differences to {base}, and this MODEL was loaded from another "
                                 f"one. Load {wanted} and put it there.")  # fmt: skip


def _changes(model: ModelPatcher, file: TunedFile) -> Iterator[tuple[str, Tensor]]:
    """What turns the MODEL's weights into those of a whole UNet; what is the same in the MODEL's type is left out."""
    names, weight_of = names_of(model), original_weight(model)
    unknown = [name for name in file.weights if name not in names]
    if unknown:
        raise ModelMismatchError(f"{file.name} has {len(unknown)} weights that this MODEL "
                                 f"({family(model.get_model_object('diffusion_model'))}) has no place for, such as "
                                 f"{', '.join(unknown[:3])}. Load the image model it was tuned on.")  # fmt: skip
    others = 0
    for name, tensor in file.weights.items():
        weight = weight_of(name)
        if weight.shape != tensor.shape:
            raise ModelMismatchError(f"{file.name} has {name} of shape {tuple(tensor.shape)}, and this MODEL has "
                                     f"{tuple(weight.shape)}. Load the image model it was tuned on.")  # fmt: skip
        is_query = name.removesuffix(".weight").endswith(QUERIES)
        if not _is_same(tensor.to(weight.device), weight, exactly=is_query):
            others += not is_query
            yield name, tensor.to(weight.device).float() - weight.float()
    if others:
        log.info("%s was tuned on another image model than this MODEL; %d more weights of its UNet are taken from "
                 "the file", file.name, others)  # fmt: skip


def _is_same(tensor: Tensor, weight: Tensor, exactly: bool) -> bool:
    """Whether a tensor is this weight in the weight's type; two roundings on the way may differ in the last bit."""
    rounded = tensor.to(weight.dtype)
    if exactly or weight.dtype not in (torch.float16, torch.bfloat16):
        return torch.equal(rounded, weight)
    kind = torch.finfo(weight.dtype)
    weight = weight.float()
    return bool(((rounded.float() - weight).abs() <= kind.eps * weight.abs() + kind.tiny * kind.eps).all())


@dataclass(frozen=True, eq=False)
class TemporalAttention:
    """Wraps the host's call of a model: inside it, T-Attn stands behind every transformer block."""

    patcher: ModelPatcher
    places: dict[str, str]
    strength: float = 1.0

    def __deepcopy__(self, memo: dict) -> TemporalAttention:
        """Immutable, so copies of a run's options share it, and with it the weights."""
        return self

    def __call__(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                 control: Any = None, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:  # fmt: skip
        options = transformer_options or {}
        base, run = executor.class_obj, memory.run_of(options)
        frames = clip_frames(base, x, options)

        def denoise() -> Tensor:
            call = MotionCall(frames, torch.arange(frames), self.strength, slab_bytes=run.slab_on(x.device))
            # The UNet takes a ControlNet's outputs off their lists one by one: each try gets lists of its own.
            hints = control and {key: list(value) for key, value in control.items()}
            with temporal_attention(base.diffusion_model, self.patcher.model, self.places, call):
                return executor(x, t, c_concat, c_crossattn, hints, options, **kwargs)

        def lessen() -> str | None:
            together = not run.apart and len(options.get("cond_or_uncond", ())) > 1 or memory.windows_in(options) > 1
            return None if together else run.halve_slab(x.device)  # a wrapper further out takes them apart

        return memory.with_less(denoise, lessen, run, x.device)


@contextmanager
def temporal_attention(unet: UNetModel, network: TunedModel, places: Mapping[str, str], call: MotionCall
                       ) -> Iterator[None]:  # fmt: skip
    """While the context lasts, a layer of `network` stands behind each transformer block."""

    def blocks() -> Iterator[tuple[nn.Module, str, nn.Module]]:
        for slot, layer in network.layers().items():
            parent, _, name = places[slot].rpartition(".")
            holder = unet.get_submodule(parent)
            yield holder, name, TemporalBlock(holder._modules[name], layer, call)

    with stand_ins(blocks()):
        yield


class TemporalBlock(nn.Module):
    """Stands for one transformer block during one call: the block, then attention over frames; owns no weights."""

    def __init__(self, block: nn.Module, layer: TemporalLayer, call: MotionCall) -> None:
        super().__init__()
        self.held = (block, layer)  # in a tuple: not children, so not part of the UNet's state dict
        self.call = call

    def forward(self, x: Tensor, context: Any = None, transformer_options: dict | None = None) -> Tensor:
        block, layer = self.held
        return layer(block(x, context=context, transformer_options=transformer_options), self.call)
