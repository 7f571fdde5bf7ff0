"""Turn an image MODEL into a video MODEL, on seams the host offers and for the length of each call only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.ldm.modules import attention as host_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..motion_modules.animatediff.spec import JointNorms, Schedule
from ..motion_modules.call import MotionCall
from ..motion_modules.errors import ModelMismatchError
from ..sampling.frame_values import FrameValues
from . import memory
from .bounds import Bounds
from .clip_checks import ClipChecks, agreed, check_frames
from .frame_maps import areas_of, values_on
from .motion import MotionModule
from .preview import show_previews
from .schedule import set_schedule
from .unet import CALLS, MotionSlot, block_of, check_fit, host_affine, inflated, joint_norms

KEY = "latentmotion"
ATTENTION = "optimized_attention_override"  # where the host looks for another attention; one that a node set stays


@dataclass(frozen=True)
class MotionSettings:
    """How one motion module is used on a MODEL.

    frames: images per clip, 0 for the whole batch. start, end: share of the sampling run, 0 to 1.
    stretch: spread a longer clip over the positions the module was trained on.
    as_evolved: take the GroupNorm statistics that AnimateDiff-Evolved takes, for v1, SDXL beta and HotshotXL.
    schedule: noise schedule to set, None to keep the image model's own.
    torch_attention: compute the image model's attention with PyTorch's kernel, whatever the host takes by itself.
    """

    strength: FrameValues = FrameValues()
    scale: FrameValues = FrameValues()
    start: float = 0.0
    end: float = 1.0
    frames: int = 0
    stretch: bool = False
    as_evolved: bool = False
    schedule: Schedule | None = None
    torch_attention: bool = False

    def acts_at(self, sigma: float, model_sampling: Any) -> bool:
        """Whether the module acts at this noise level of the host's `model_sampling`."""
        if self.strength.is_zero:
            return False
        if self.start <= 0.0 and self.end >= 1.0:
            return True
        first, last = (model_sampling.percent_to_sigma(share) for share in (self.start, self.end))
        return last < sigma <= first or (self.end >= 1.0 and sigma <= first)


@dataclass(frozen=True, eq=False)
class Motion:
    """A motion module with its settings."""

    module: MotionModule
    settings: MotionSettings

    @property
    def joint(self) -> JointNorms:
        variant = self.module.spec.variant
        return variant.joint_as_evolved if self.settings.as_evolved else variant.joint

    def slots(self, unet: Any, call: MotionCall) -> Iterator[tuple[nn.Module, MotionSlot]]:
        """For one call: every block of the UNet that gets a temporal transformer, and the layer to put there."""
        for name, transformer in self.module.patcher.model.transformers().items():
            yield block_of(unet, self.module.spec, name), MotionSlot(transformer, call, self.joint.motion)


def apply_motion(model: ModelPatcher, module: MotionModule, settings: MotionSettings) -> ModelPatcher:
    """Return a clone of `model` that makes video with this module, on top of modules it already has.

    Raises ModelMismatchError when the two do not belong together.
    """
    check_fit(model.get_model_object("diffusion_model"), module.spec, module.name)
    model = model.clone()
    before = _motions_of(model)
    if any(motion.module.patcher.model is module.patcher.model for motion in before):
        raise ModelMismatchError(f"{module.name} is already applied to this MODEL. Apply another file, or put all "
                                 "MotionLoRAs on one motion module before applying it.")
    _install(model, (*before, Motion(module, settings)))
    if settings.schedule is not None:
        set_schedule(model, settings.schedule)
    if settings.torch_attention:
        model.model_options["transformer_options"].setdefault(ATTENTION, pytorch_attention)
    return model


def pytorch_attention(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """An override of the host's attention, in its signature: what it calls by itself gives way to PyTorch's.

    On CPUs and Macs the host takes a sub-quadratic one, which was 1.2 times slower over a whole call (bench motion).
    """
    return host_attention.attention_pytorch(*args, **kwargs)


def _motions_of(model: ModelPatcher) -> tuple[Motion, ...]:
    return next((wrapper.motions for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)), ())


def _install(model: ModelPatcher, motions: tuple[Motion, ...]) -> None:
    frames = motions[0].settings.frames
    bounds, checks = Bounds(motions), ClipChecks(motions)
    for kind, *wrappers in ((WrappersMP.APPLY_MODEL, Inflation(motions)), (WrappersMP.PREDICT_NOISE, publish_clip),
                            (WrappersMP.CALC_COND_BATCH, publish_window, bounds.predict),
                            (WrappersMP.OUTER_SAMPLE, bounds.sample, checks.sample),
                            (WrappersMP.PREPARE_SAMPLING, bounds.prepare)):
        model.remove_wrappers_with_key(kind, KEY)
        for wrapper in wrappers:
            model.add_wrapper_with_key(kind, KEY, wrapper)
    model.set_additional_models(KEY, [motion.module.patcher for motion in motions])
    model.set_attachments(KEY, {"frames": frames})
    show_previews(model)


def publish_clip(executor: Callable, x: Tensor, timestep: Tensor, model_options: dict, *args: Any, **kw: Any) -> Tensor:
    """Tell neighbouring packs the length of the clip, under the key they read."""
    window = model_options.get("transformer_options", {}).get("context_window")
    frames = x.shape[0] if window is None else window.total_frames
    params = {"full_length": frames, "context_length": None, "sub_idxs": None}
    if model_options.get("context_handler") is not None and bool((timestep == timestep[0]).all()):
        # The host's context windows look the sigma up in the schedule; some versions fail on a batch of equal ones.
        timestep = timestep[:1]
    return executor(x, timestep, _with(model_options, {"ad_params": params}), *args, **kw)


def publish_window(executor: Callable, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: dict,
                   *args: Any, **kw: Any) -> Any:
    """Tell neighbouring packs which frames of the clip the coming call works on, and ours on which areas."""
    timestep = timestep.expand(x.shape[0])
    model_options = _with(model_options, areas_of(conds, x))
    options = model_options["transformer_options"]
    indices = window_indices(options)
    if indices is not None:
        params = {"full_length": x.shape[0], **options.get("ad_params", {}), "sub_idxs": indices,
                  "context_length": len(indices) // memory.windows_in(options)}
        model_options = _with(model_options, {"ad_params": params})
    return executor(model, conds, x, timestep, model_options, *args, **kw)


def _with(model_options: dict, extra: dict) -> dict:
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), **extra}}


def window_indices(transformer_options: dict) -> list[int] | None:
    """Frames of the clip in the call, with the frame some hosts put before a window (and cut off afterwards)."""
    window = transformer_options.get("context_window")
    return None if window is None else [*_anchor(window), *window.index_list]


def _anchor(window: Any) -> list[int]:
    index = getattr(window, "causal_anchor_index", None)
    return [] if index is None or index < 0 else [index]


@dataclass(frozen=True, eq=False)
class Inflation:
    """Wraps the host's call of a model: the UNet is a video UNet inside it, and an image UNet before and after."""

    motions: tuple[Motion, ...]

    def __deepcopy__(self, memo: dict) -> Inflation:
        """Immutable, so copies of a run's options share it, and with it the weights."""
        return self

    def __call__(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                 control: Any = None, transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        options = transformer_options or {}
        base = executor.class_obj
        calls = {number: _call_of(motion, x, options) for number, motion in enumerate(self.motions)
                 if motion.settings.acts_at(float(t.max()), base.model_sampling)}
        if not calls:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        unet, run = base.diffusion_model, memory.run_of(options)

        def denoise() -> Tensor:
            fitting = {number: replace(call, slab_bytes=run.slab_on(x.device)) for number, call in calls.items()}
            slots = [pair for number, call in fitting.items() for pair in self.motions[number].slots(unet, call)]
            norms = [norm for number in calls for norm in joint_norms(unet, self.motions[number].joint)]
            # The UNet takes a ControlNet's outputs off their lists one by one: each try gets lists of its own.
            hints = control and {key: list(value) for key, value in control.items()}
            with inflated(unet, slots, norms, agreed(call.frames for call in calls.values())):
                return executor(x, t, c_concat, c_crossattn, hints, {**options, CALLS: fitting}, **kwargs)

        def lessen() -> str | None:
            together = not run.apart and len(options.get("cond_or_uncond", ())) > 1 or memory.windows_in(options) > 1
            return None if together else run.halve_slab(x.device)  # a wrapper further out takes them apart

        return memory.with_less(denoise, lessen, run, x.device)


def _call_of(motion: Motion, x: Tensor, options: dict) -> MotionCall:
    """Work out frames, positions and per-frame values of one call from the batch the host made."""
    settings, spec = motion.settings, motion.module.spec
    images = x.shape[0] // max(1, len(options.get("cond_or_uncond", (0,))))
    indices = window_indices(options)
    frames = settings.frames if settings.frames and indices is None else images // memory.windows_in(options)
    extra = len(_anchor(options["context_window"])) if indices is not None else 0
    check_frames(frames, images, motion, indices is not None, extra)
    indices = indices if indices is not None else list(range(frames))
    return MotionCall(
        frames=frames,
        positions=_positions(frames, spec.positions, extra).to(x.device),
        strength=values_on(settings.strength, indices, x, options),
        scale=values_on(settings.scale, indices, x, options),
        affine=host_affine,
    )


def _positions(frames: int, known: int, extra: int) -> Tensor:
    """Place of each frame on the module's time axis; a frame the host put in front of a full window shares a place.

    Shapes: -> (frames,).
    """
    if known < frames <= known + extra:
        return (torch.arange(frames, dtype=torch.float32) - extra).clamp(min=0)
    return torch.linspace(0, known - 1, frames) if frames > known else torch.arange(frames, dtype=torch.float32)
