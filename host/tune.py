"""One-shot tuning of an image MODEL on a clip (Tune-A-Video), inside a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..media.clip import Clip, part_of_clip
from ..motion_modules.animatediff.spec import V2, MotionSpec
from ..motion_modules.call import MotionCall
from ..motion_modules.errors import TrainingError
from ..motion_modules.files import read_metadata, read_weights
from ..motion_modules.tune_a_video.attention import Reach
from ..motion_modules.tune_a_video.checkpoint import QUERIES, Base, portable, read_tuned
from ..motion_modules.tune_a_video.network import TunedModel, initial_weights, trained_shapes
from ..training.attention import over_frames
from ..training.dataset import Dataset, Film
from ..training.estimate import run_bytes
from ..training.frozen import frozen, recomputed, training
from ..training.recipe import Recipe, chosen
from . import attention as frames_of
from . import tuned
from .attention import FrameAttention
from .material import Material, material
from .resident import resident
from .samples import Samples
from .train import (
    Conditions,
    Training,
    call_options,
    check_image_model,
    in_place,
    is_finished,
    learn,
    loss_scale,
    noise_loss,
    signed,
    working_type,
    write_file,
)
from .training_layers import heavy_layers, layers_of
from .video import clip_of

ABOUT = "clip, prompt or model"
LOADERS = ("ckpt_name", "unet_name", "model_name", "model_path")


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """What a MODEL is tuned by. base_name: file of the image model, as far as the graph tells. reach: the frames that
    self-attention sees; another than Tune-A-Video's is for measuring what that one does."""

    base_name: str = ""
    reach: Reach = Reach.SPARSE

    def settings(self) -> dict[str, Any]:
        return {} if self.reach is Reach.SPARSE else {"keys_from": self.reach.value}


def loader_name(prompt: Mapping[str, Any] | None, node: str | None) -> str:
    """File that the MODEL of a node was loaded from, by following the graph upwards; empty where it does not tell."""
    seen = set()
    while prompt and node in prompt and node not in seen:
        seen.add(node)
        inputs = prompt[node]["inputs"]
        named = [inputs[name] for name in LOADERS if isinstance(inputs.get(name), str)]
        if named:
            return named[0]
        node = inputs["model"][0] if isinstance(inputs.get("model"), list) else None
    return ""


def tune_video_model(model: ModelPatcher, clip: Any, vae: Any, video: Any, prompt: str, how: Tuning) -> ModelPatcher:
    """Tune on the pictures of an IMAGE or VIDEO, write the file, and return the tuned MODEL.

    The MODEL that comes in is not changed. On Cancel the state stays on the disk.
    Raises TrainingError and ModelMismatchError with a sentence for the user.
    """
    frames_of.check_image_unet(model.get_model_object("diffusion_model"), "Tuning")
    check_image_model(model)
    if not prompt.strip():
        raise TrainingError("The clip has no prompt. Write what it shows, and later change the words of it.")
    film = clip_of(video)
    taken = Film("The video", chosen_frames(film, how.frames, how.stride), (how.frames,), (prompt.strip(),))
    _tune(resident(model), material(model, clip, vae, Dataset((taken,)), how, drop=0.0, stride=1), how)
    file = read_tuned(read_weights(how.path), read_metadata(how.path), how.path.name)
    made = tuned.apply_tuned(model, file)
    return made if how.reach is Reach.SPARSE else frames_of.apply_frame_attention(made, FrameAttention(how.reach))


def chosen_frames(film: Clip, frames: int, stride: int) -> Clip:
    """The first frames, `stride` apart. Source: showlab/Tune-A-Video's data set."""
    span = (frames - 1) * stride + 1
    if film.frames < span:
        raise TrainingError(f"The video has {film.frames} frames, and {frames} frames with a stride of {stride} need "
                            f"{span}. Choose fewer frames or a smaller stride, or give a longer video.")  # fmt: skip

    def chunks() -> Iterator[Tensor]:
        at = 0
        for chunk in part_of_clip(film, 0, span).chunks():
            first = -at % stride
            if first < len(chunk):
                yield chunk[first::stride]
            at += len(chunk)

    return replace(film, frames=frames, chunks=chunks, sound=None)


def _tune(model: ModelPatcher, learned: Material, how: Tuning) -> None:
    base, recipe = tuned.base_of(model, how.base_name), signed(how, learned, [model])
    if is_finished(how, recipe, ABOUT):
        return
    clips = learned.clips()
    trained, needed = foreseen(model, clips.frames, clips.latents[0].shape[-2:], how.recompute)
    how.report.begin(how.path, trained, needed)
    with in_place([model], needed), training():
        conditions = Conditions(model, learned.contexts, clips)
        with frozen(model.model):
            network = new_network(model, recipe.seed)
            with tuned_unet(model, network, clips.frames, how.recompute, how.reach) as (parameters, options):
                write, parameters = _writer(parameters, base, recipe, how), _learning(parameters, recipe)
                loss_of = noise_loss(model.model, clips, conditions, options, recipe)
                samples = Samples(model.model, clips, conditions, options, recipe.seed)
                learn(parameters, loss_of, recipe, how, loss_scale(recipe), write, samples)


def foreseen(model: ModelPatcher, frames: int, size: tuple[int, int], recompute: bool) -> tuple[int, int]:
    """Numbers that learn, and bytes that a run takes besides the model. size: of the latents."""
    trained = sum(torch.Size(shape).numel() for shape in trained_shapes(tuned.slots_of(model)).values())
    plain = layers_of(model.model.diffusion_model, MotionSpec(V2, (), 0), size, frames, model.load_device)
    layers = [replace(layer, scores=2 * layer.scores) for layer in plain]  # two frames of keys
    return trained, run_bytes(trained, layers, frames, working_type(model.model).itemsize, recompute)


def new_network(model: ModelPatcher, seed: int) -> TunedModel:
    """T-Attn for this MODEL as training begins with it, on its device and in the type it computes in."""
    unet, places, slots = model.model.diffusion_model, tuned.places_of(model), tuned.slots_of(model)
    heads = tuple(unet.get_submodule(places[slot]).n_heads for slot, _ in slots)
    network = TunedModel(slots, heads, dtype=working_type(model.model), device=model.load_device)
    network.load_state_dict(initial_weights(slots, seed))
    for layer in network.layers().values():
        layer.norm_temp.requires_grad_(False)
    return network


@contextmanager
def tuned_unet(model: ModelPatcher, network: TunedModel, frames: int, recompute: bool, reach: Reach = Reach.SPARSE
               ) -> Iterator[tuple[dict[str, nn.Parameter], dict]]:  # fmt: skip
    """While the context lasts the UNet is the tuned one, with this T-Attn, backward passes included.

    Yields what is trained, by the release's names, and the options of the UNet's calls.
    """
    unet, places = model.model.diffusion_model, tuned.places_of(model)
    call = MotionCall(frames, torch.arange(frames), attention=over_frames)
    heavy = list(heavy_layers(unet)) if recompute else []
    temporal = {name: p for name, p in network.named_parameters() if p.requires_grad}
    names = {f"{slot}.{part}.weight": f"{places[slot]}.{part}" for slot in places for part in QUERIES}
    with trainable(unet, names, working_type(model.model)) as queries, recomputed(heavy), \
            FrameAttention(reach).on(unet, frames), \
            tuned.temporal_attention(unet, network, places, call):  # fmt: skip
        yield {**queries, **temporal}, call_options(model)


@contextmanager
def trainable(unet: UNetModel, names: Mapping[str, str], dtype: torch.dtype) -> Iterator[dict[str, nn.Parameter]]:
    """While the context lasts, copies stand for the weights of these layers, and gradients reach them.

    names: name to give a weight -> dotted name of its layer.
    """
    layers = {name: unet.get_submodule(layer) for name, layer in names.items()}
    saved = {name: layer._parameters["weight"] for name, layer in layers.items()}
    made = {name: nn.Parameter(weight.detach().to(dtype, copy=True)) for name, weight in saved.items()}
    try:
        for name, layer in layers.items():
            layer._parameters["weight"] = made[name]
        yield made
    finally:
        for name, layer in layers.items():
            layer._parameters["weight"] = saved[name]


def _learning(parameters: dict[str, nn.Parameter], recipe: Recipe) -> dict[str, nn.Parameter]:
    """Those of the parameters that the recipe trains; no gradient reaches the others."""
    names = chosen(parameters, recipe.trains)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    return {name: parameters[name] for name in names}


def _writer(parameters: dict[str, nn.Parameter], base: Base, recipe: Recipe, how: Tuning) -> Callable[[dict], None]:
    """What writes the file: queries as differences to what they are now, everything as float16."""
    before = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()
              if "attn_temp" not in name}  # fmt: skip

    def write(learned: dict[str, Tensor]) -> None:
        weights = {name: p.detach().float() for name, p in parameters.items()} | learned
        changes = {name: weights[name].cpu() - value for name, value in before.items()}
        temporal = {name: value for name, value in weights.items() if name not in before}
        tensors, about = portable(temporal, changes, base)
        write_file(how.path, tensors, recipe, torch.float16, about)

    return write
