"""Training inside a node: the host's models lend their weights to one run, and are what they were afterwards."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..motion_modules.animatediff.lora import read_motion_lora
from ..motion_modules.animatediff.spec import JointNorms, MotionSpec
from ..motion_modules.call import MotionCall
from ..motion_modules.errors import ModelMismatchError, TrainingError
from ..motion_modules.files import read_weights
from ..motion_modules.norm import Affine
from ..training.attention import attention, over_frames
from ..training.checkpoint import read_recipe, read_state_recipe, save_weights
from ..training.estimate import run_bytes
from ..training.frozen import frozen, recomputed, training
from ..training.loop import Stopped, fit
from ..training.lora import LowRankSet, attention_layers, published_pairs
from ..training.recipe import Recipe
from . import attention as frames_of
from . import inflate, tuned
from .dataset import dataset_of
from .inflate import Motion, MotionSettings
from .material import Material, fingerprint, material
from .motion import MotionModule, check_teachable, patch_motion_lora
from .progress import Report, TrainingProgress
from .resident import resident
from .samples import Samples
from .schedule import set_schedule
from .train_loss import Conditions, loss_scale, noise_loss, precision_of, working_type
from .train_words import other_settings
from .training_layers import heavy_layers, layers_of
from .unet import CALLS, MotionSlot, check_fit, host_affine, inflated, joint_norms

MATERIAL = "clips, captions, frames or models"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What something is trained by.

    path: the file to write. frames, stride: of a training clip. clip_length: images per clip, 0 for all of them.
    save_every, save_every_s: steps and seconds between two states on the disk. sample_every: steps between two clips
    that are drawn to look at, 0 for none. go_on: take up an interrupted run, or keep a finished one. report: filled in
    by the run.
    """

    path: Path
    recipe: Recipe
    frames: int = 1
    stride: int = 1
    clip_length: int = 0
    recompute: bool = True
    save_every: int = 50
    save_every_s: float = 120.0
    sample_every: int = 0
    go_on: bool = True
    report: Report = field(default_factory=Report, compare=False)

    @property
    def state(self) -> Path:
        return self.path.with_name(self.path.name + ".training")

    @property
    def latents(self) -> Path:
        return self.path.with_name(self.path.name + ".latents")

    def settings(self) -> dict[str, Any]:
        """What the result depends on besides the recipe, the clips and the models."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LoraTraining(Training):
    """What a low-rank change is trained by. alpha: it counts alpha / rank."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}


@dataclass(frozen=True, eq=False)
class Learner:
    """What learns in a run: its parameters, the options the UNet is called with, and the file its values make."""

    parameters: dict[str, nn.Parameter]
    options: dict[str, Any]
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Stage:
    """What differs between trainings.

    trained: how many numbers learn. spec: the motion module in the UNet meanwhile. patchers: models of the host that
    are needed besides the image model. begin: the learner, in place while the context lasts.
    """

    trained: int
    spec: MotionSpec | None
    patchers: tuple[ModelPatcher, ...]
    begin: Callable[[], AbstractContextManager[Learner]]


def train_motion_lora(
    model: ModelPatcher, module: MotionModule, clip: Any, vae: Any, clips: Any, captions: str, how: LoraTraining
) -> MotionModule:
    """Train a MotionLoRA on an IMAGE, VIDEO or dataset, write it, and return the motion module with it.

    On Cancel the state stays on the disk. Raises TrainingError, ModelMismatchError and ClipError in words for the user.
    """
    check_image_model(model)
    check_motion(model, module.spec, module.name, how)
    check_teachable(module)
    learned = material(model, clip, vae, dataset_of(clips, captions, how.clip_length), how)
    model = resident(model)
    if module.spec.variant.schedule is not None:
        set_schedule(model, module.spec.variant.schedule)
    network = module.patcher.model
    names = attention_layers(network, how.recipe.trains)

    @contextmanager
    def begin() -> Iterator[Learner]:
        changes, motion = LowRankSet(network, names, how.rank, how.recipe.seed), Motion(module, MotionSettings())
        call = motion_call(model, how.frames, host_affine)
        slots = motion.slots(model.model.diffusion_model, call)
        with changes.on(network, how.scale), video_unet(model, slots, motion.joint, call, how.recompute) as options:
            yield Learner(dict(changes.named_parameters()), options, partial(published_pairs, changes, how.scale))

    run(Stage(lora_size(network, names, how.rank), module.spec, (module.patcher,), begin), model, learned, how)
    return patch_motion_lora(module, read_motion_lora(read_weights(how.path), how.path.name), 1.0)


def check_image_model(model: ModelPatcher) -> None:
    """Raise ModelMismatchError for a MODEL that makes video already."""
    if any(model.get_wrappers(WrappersMP.APPLY_MODEL, key) for key in (inflate.KEY, frames_of.KEY, tuned.KEY)):
        raise ModelMismatchError("This MODEL makes video already, and training does that by itself. Connect the image "
                                 "model, from before nodes for motion and ST-Attention.")  # fmt: skip


def check_motion(model: ModelPatcher, spec: MotionSpec, name: str, how: Training) -> None:
    """Raise ModelMismatchError or TrainingError unless the module fits the MODEL and has that many frames."""
    check_fit(model.get_model_object("diffusion_model"), spec, name)
    if how.frames > spec.positions:
        raise TrainingError(f"{name} knows {spec.positions} frame positions, and frames is {how.frames}. "
                            f"Set frames to at most {spec.positions}.")  # fmt: skip
    if how.recipe.frames_seen > how.frames:
        raise TrainingError(f"frames_seen is {how.recipe.frames_seen}, and a clip has {how.frames} frames. Set it to "
                            f"at most {how.frames}, or to 0 for all of them.")  # fmt: skip


def lora_size(network: nn.Module, names: list[str], rank: int) -> int:
    """Numbers in low-rank changes of these layers."""
    layers = [network.get_submodule(name) for name in names]
    return rank * sum(layer.in_features + layer.out_features for layer in layers)


def run(stage: Stage, model: ModelPatcher, learned: Material, how: Training) -> None:
    """Train, and write the file; nothing is done where it is there already. Raises TrainingError."""
    patchers = [model, *stage.patchers]
    recipe = signed(how, learned, patchers)
    if not is_finished(how, recipe):
        clips = learned.clips()
        seen = how.recipe.frames_seen or clips.frames
        images, item = how.recipe.batch * seen, working_type(model.model).itemsize
        layers = layers_of(model.model.diffusion_model, stage.spec, clips.latents[0].shape[-2:], seen,
                           model.load_device)  # fmt: skip
        needed = run_bytes(stage.trained, layers, images, item, how.recompute, how.recipe.optimiser)
        how.report.begin(how.path, stage.trained, needed)
        with in_place(patchers, needed), training():
            told = conditions = Conditions(model, learned.contexts, clips)
            if seen < clips.frames:
                told = Conditions(model, learned.contexts, replace(clips, frames=seen))
            with frozen(*(patcher.model for patcher in patchers)), stage.begin() as learner:
                loss_of = noise_loss(model.model, clips, told, learner.options, recipe)
                samples = Samples(model.model, clips, conditions, learner.options, recipe.seed)
                learn(learner.parameters, loss_of, recipe, how, loss_scale(recipe),
                      lambda weights: write_file(how.path, learner.tensors(weights), recipe, learner.dtype),
                      samples)  # fmt: skip
    shutil.rmtree(how.latents, ignore_errors=True)


@contextmanager
def in_place(patchers: list[ModelPatcher], needed: float = 0) -> Iterator[None]:
    """While the context lasts the models are on their device as their patches make them, the first one as in a
    sampling run, with `needed` bytes free beside them."""
    comfy.model_management.load_models_gpu(patchers, memory_required=needed, force_full_load=True)
    patchers[0].pre_run()
    try:
        yield
    finally:
        patchers[0].cleanup()


def write_file(path: Path, tensors: dict[str, Tensor], recipe: Recipe, dtype: torch.dtype,
               about: dict[str, str] | None = None) -> None:  # fmt: skip
    """Write what a run has learned. Raises TrainingError where that cannot be done; the run's state stays."""
    try:
        save_weights(path, tensors, recipe.told(), dtype, about)
    except OSError as error:
        raise TrainingError(f"{path} could not be written ({error}). Make room on that disk and run again: "
                            "training is finished, and only the file is missing.") from error  # fmt: skip


def learn(parameters: dict[str, nn.Parameter], loss_of: Callable, recipe: Recipe, how: Training, scale: float,
          write: Callable[[dict[str, Tensor]], None], samples: Samples | None = None) -> None:  # fmt: skip
    """The run itself; `write` gets the weights at its end. On Cancel it says where the state is."""
    losses: list[float] = []
    progress = TrainingProgress(how.path, recipe.steps, losses, how.report)
    stop = comfy.model_management.processing_interrupted

    def on_step(step: int, total: int, loss: float) -> None:
        if samples and how.sample_every and step % how.sample_every == 0:
            progress.strip = samples.strip()
        progress(step, total, loss)

    try:
        fit(parameters, loss_of, recipe, how.state, on_step, stop, how.save_every_s, how.save_every, losses=losses,
            loss_scale=scale, finish=write)  # fmt: skip
        how.report.written(how.path)
    except (Stopped, comfy.model_management.InterruptProcessingException):  # the host's layers answer Cancel as well
        log.info("Training stopped after step %d; run it again to go on. Its state: %s",
                 len(losses), how.state)  # fmt: skip
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def motion_call(model: ModelPatcher, frames: int, affine: Affine) -> MotionCall:
    """What the motion module is told in every call of a run."""
    positions = torch.arange(frames, dtype=torch.float32, device=model.load_device)
    return MotionCall(frames, positions, attention=over_frames, affine=affine)


def call_options(model: ModelPatcher) -> dict[str, Any]:
    """The options the UNet is called with in a run: those of the MODEL, and an attention that learns quickly.

    What other nodes put around and into its calls is left out: caches, compilers, FreeU, merged tokens and the like
    are for sampling, and some of them cannot be trained through.
    """
    own = model.model_options["transformer_options"]
    left_out = {"wrappers", "callbacks", "patches", "patches_replace"}
    return {"optimized_attention_override": attention, "cond_or_uncond": [0],
            **{key: value for key, value in own.items() if key not in left_out}}  # fmt: skip


@contextmanager
def video_unet(model: ModelPatcher, slots: Iterable[tuple[nn.Module, MotionSlot]], joint: JointNorms, call: MotionCall,
               recompute: bool) -> Iterator[dict]:  # fmt: skip
    """While the context lasts the UNet makes video, backward passes included. Yields the options of its calls."""
    unet, slots = model.model.diffusion_model, list(slots)
    heavy = [*heavy_layers(unet), *(slot.held[0] for _, slot in slots)] if recompute else []
    with recomputed(heavy), inflated(unet, slots, list(joint_norms(unet, joint)), call.frames):
        yield call_options(model) | {CALLS: {0: call}}


def signed(how: Training, learned: Material, patchers: list[ModelPatcher]) -> Recipe:
    """The recipe of a run, with everything else the result depends on. The first of the models is the one that learns.

    Raises TrainingError where it asks for a precision that the MODEL does not compute in.
    """
    model = patchers[0]
    with in_place(patchers):
        precision, schedule = precision_of(model.model), model.get_model_object("model_sampling")
        models = [fingerprint(patcher.model) for patcher in patchers]
    asked = how.recipe.precision
    if asked not in ("", precision):
        raise TrainingError(f"The recipe asks for {asked}, and this MODEL computes in {precision}. Load the model so "
                            f"that it computes in {asked}, or leave precision out of the recipe.")  # fmt: skip
    kinds = [kind.__name__ for kind in type(schedule).__mro__]
    ends = [f"{float(sigma):.4g}" for sigma in (schedule.sigma_min, schedule.sigma_max)]
    about = {**how.settings(), "clips": learned.told(), "models": models, "sampling": kinds + ends}
    return replace(how.recipe, about=json.dumps(about, sort_keys=True), likeness=learned.likeness(),
                   precision=precision, recompute=how.recompute)  # fmt: skip


def is_finished(how: Training, recipe: Recipe, material: str = MATERIAL) -> bool:
    """Whether the file is there already, or else what the run has to begin with: nothing, or a state of its own.

    material: the clips and models, in words. Raises TrainingError where something else would be replaced,
    or cannot be read. Starting over it is replaced, and a state that is another's or damaged is deleted.
    """
    if not how.go_on:
        if not _goes_on(how.state, recipe):
            how.state.unlink()
        return False
    if how.path.is_file():
        made = read_recipe(how.path)
        if made is not None and not recipe.differences(made):
            how.report.finished(how.path)
            return True
        raise TrainingError(f"{how.path} is there already, and was made with other settings or clips. Choose another "
                            "file_name, or set existing to 'start over' to replace it.")  # fmt: skip
    began = read_state_recipe(how.state)
    other = [] if began is None else other_settings(recipe, began, material)
    if other:
        raise TrainingError(f"An interrupted training of {how.path.name} was begun with other settings: "
                            f"{', '.join(other)}. Set them back to go on with it, choose another file_name, or set "
                            "existing to 'start over'.")  # fmt: skip
    return False


def _goes_on(state: Path, recipe: Recipe) -> bool:
    """Whether a run of this recipe can begin with what is there: nothing, or a readable state of its own."""
    try:
        began = read_state_recipe(state)
    except TrainingError:
        return False
    return began is None or not recipe.differences(began)
