"""The first two stages of AnimateDiff: what single frames look like, then how they move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..motion_modules.animatediff.checkpoint import read_motion_module
from ..motion_modules.animatediff.network import MotionModel
from ..motion_modules.animatediff.publish import new_spec, published, still_module
from ..motion_modules.animatediff.spec import MotionSpec
from ..motion_modules.errors import ModelMismatchError
from ..motion_modules.files import read_weights
from ..motion_modules.norm import plain_affine
from ..training.frozen import recomputed, training
from ..training.lora import LowRankSet, published_pairs
from ..training.recipe import chosen
from .dataset import dataset_of
from .material import fingerprint, material
from .motion import MotionModule, manage
from .resident import resident
from .schedule import set_schedule
from .train import (
    Learner,
    LoraTraining,
    Stage,
    Training,
    call_options,
    check_image_model,
    check_motion,
    lora_size,
    motion_call,
    run,
    video_unet,
    working_type,
)
from .training_layers import heavy_layers
from .unet import MotionSlot, block_of, levels_of


@dataclass(frozen=True, kw_only=True)
class ModuleTraining(Training):
    """What a motion module is trained by. with_mid: a new one has a module in the middle block, as v2 has. convolves:
    it has convolutions over frames in place of attention."""

    with_mid: bool = False
    convolves: bool = False
    start: str = ""

    def settings(self) -> dict[str, Any]:
        return {"start": self.start}


def train_domain_adapter(
    model: ModelPatcher, clip: Any, vae: Any, clips: Any, captions: str, how: LoraTraining
) -> ModelPatcher:
    """Train low-rank changes to the image model's attentions on single frames, write them, and return it with them.

    The MODEL that comes in is not changed or copied. On Cancel the state stays on the disk.
    Raises TrainingError and ModelMismatchError with a sentence for the user.
    """
    check_image_model(model)
    levels_of(model.get_model_object("diffusion_model"))
    dataset = dataset_of(clips, captions, 1 if isinstance(clips, Tensor) else 0)
    learned = material(model, clip, vae, dataset, how)
    taught = resident(model)
    unet, layers = taught.model.diffusion_model, published_layers(taught, how.recipe.trains)

    @contextmanager
    def begin() -> Iterator[Learner]:
        changes = LowRankSet(unet, list(layers), how.rank, how.recipe.seed)
        with changes.on(unet, how.scale), recomputed(heavy_layers(unet) if how.recompute else ()):
            tensors = partial(published_pairs, changes, how.scale, names=layers)
            yield Learner(dict(changes.named_parameters()), call_options(taught), tensors)

    run(Stage(lora_size(unet, list(layers), how.rank), None, (), begin), taught, learned, how)
    return comfy.sd.load_lora_for_models(model, None, read_weights(how.path), 1.0, 0.0)[0]


def published_layers(model: ModelPatcher, parts: Sequence[str]) -> dict[str, str]:
    """The UNet's attention projections whose published names hold one of `parts`, all of them for none.

    The host's name to the published one (diffusers' layout), without `.weight`.
    """
    theirs = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    ends = tuple(f".{kind}.to_{part}.weight" for kind in ("attn1", "attn2") for part in ("q", "k", "v", "out.0"))
    there = {name for name, layer in model.model.diffusion_model.named_modules() if isinstance(layer, nn.Linear)}
    named = {own.removesuffix(".weight"): name.removesuffix(".weight") for name, own in theirs.items()
             if name.endswith(ends)}  # fmt: skip
    found = {own: name for own, name in named.items() if own in there}
    if not found:
        raise ModelMismatchError("This MODEL has no attention layers under names that a LoRA could have. Use an image "
                                 "model of SD1.x, SD2.x or SDXL.")  # fmt: skip
    names = set(chosen(found.values(), parts))
    return {own: name for own, name in found.items() if name in names}


def train_motion_module(
    model: ModelPatcher, clip: Any, vae: Any, clips: Any, captions: str, how: ModuleTraining,
    module: MotionModule | None = None,
) -> MotionModule:  # fmt: skip
    """Train a motion module on clips, write it in the published layout, and return it.

    It starts as a copy of `module`, MotionLoRAs included, or as a new one that changes nothing. Neither MODEL nor
    module is changed. On Cancel the state stays on the disk.
    Raises TrainingError, ModelMismatchError and ClipError with a sentence for the user.
    """
    check_image_model(model)
    unet = model.get_model_object("diffusion_model")
    spec = module.spec if module else new_spec(*levels_of(unet), how.with_mid, how.convolves)
    check_motion(model, spec, module.name if module else "The new motion module", how)
    learned = material(model, clip, vae, dataset_of(clips, captions, how.clip_length), how)
    model = resident(model)
    if spec.variant.schedule is not None:
        set_schedule(model, spec.variant.schedule)
    start = starting_point(spec, module, how.recipe.seed)
    how = replace(how, start=fingerprint(start))
    run(_stage(model, spec, start, how), model, learned, how)
    return manage(read_motion_module(read_weights(how.path), how.path.name), how.path.name)


def _stage(model: ModelPatcher, spec: MotionSpec, network: MotionModel, how: ModuleTraining) -> Stage:
    parts = chosen(dict(network.named_parameters()), how.recipe.trains)

    @contextmanager
    def begin() -> Iterator[Learner]:
        network.to(model.load_device, working_type(model.model)).requires_grad_(False)
        learned = {name: network.get_parameter(name).requires_grad_(True) for name in parts}
        unet, joint = model.model.diffusion_model, spec.variant.joint
        call = motion_call(model, how.frames, plain_affine)
        slots = [(block_of(unet, spec, name), MotionSlot(transformer, call, joint.motion))
                 for name, transformer in network.transformers().items()]  # fmt: skip
        with video_unet(model, slots, joint, call, how.recompute) as options:
            yield Learner(learned, options, lambda weights: published(spec, network.state_dict() | weights),
                          torch.float16)  # fmt: skip

    return Stage(sum(network.get_parameter(name).numel() for name in parts), spec, (), begin)


def starting_point(spec: MotionSpec, module: MotionModule | None, seed: int) -> MotionModel:
    """A module to train, float32 on the CPU: a copy of the given one with its MotionLoRAs, or a new one."""
    with training():
        if module is None:
            return still_module(spec, seed)
        comfy.model_management.load_models_gpu([module.patcher], force_full_load=True)
        network = MotionModel(spec, nn)
        network.load_state_dict({key: t.detach().float().cpu() for key, t in module.patcher.model.state_dict().items()})
        return network
