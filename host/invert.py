"""DDIM inversion on the host's samplers: the way up is a sampler of the host like any other, so that whatever follows a
sampling run (motion modules, windows, ControlNets, hooks, guidance, memory) follows this one too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from tqdm.auto import trange

from ..motion_modules.errors import ClipError, ModelMismatchError, check_choice
from ..sampling.inversion import Ascent, Convention, Trajectory, climb, plan_ascent, relative_rmse
from ..sampling.noise import mark_whole, standardise
from .bounds import BareBounds
from .reuse import KEY as REUSE
from .schedule import noise_scale, prediction_of

# Of the host since its first versions; a fixed list, so that saved workflows mean the same on every host.
SCHEDULERS = ["ddim_uniform", "normal", "simple", "sgm_uniform", "karras", "exponential", "beta", "linear_quadratic",
              "kl_optimal"]  # fmt: skip
KEY = "latentmotion_inversion"
CONVENTIONS = [convention.value for convention in Convention]


@dataclass(frozen=True)
class Inversion:
    """How a clip is inverted. denoise: share of the way to pure noise. keep: frames from the end whose path is kept.

    check: sample the result back, to measure the error. standardise: by what share, see `sampling.noise`.
    """

    steps: int = 50
    scheduler: str = SCHEDULERS[0]
    denoise: float = 1.0
    cfg: float = 1.0
    convention: Convention = Convention.RELEASED
    keep: int = 0
    check: bool = True
    standardise: float = 0.0


@dataclass(frozen=True, eq=False)
class Inverted:
    """What an inversion gives: the noisy clip as a LATENT, as a NOISE, and the SIGMAS to sample it with.

    path: the last frames, as many as are kept, at every level. error: relative RMSE of the clip sampled back, NaN
    where it was not measured.
    """

    latent: dict
    noise: InvertedNoise
    sigmas: Tensor
    path: Trajectory
    error: float

    @property
    def report(self) -> str:
        """What the node shows."""
        way = f"{len(self.sigmas) - 1} steps up to noise level {float(self.sigmas[0]):.2f}"
        if isnan(self.error):
            return f"{way}. Reconstruction not measured."
        return f"{way}. Sampled back without edits, the latents differ by {100 * self.error:.3g} % (relative RMSE)."


class InvertedNoise:
    """A NOISE that starts any sampler at the inverted clip, whatever clip is at its latent_image."""

    seed = 0

    def __init__(self, model: ModelPatcher, samples: Tensor, sigmas: Tensor) -> None:
        self._prepare = model.get_model_object("process_latent_in")
        self._top = self._prepare(samples)
        self._scale = noise_scale(model.get_model_object("model_sampling"), sigmas.cpu())

    def generate_noise(self, input_latent: dict) -> Tensor:
        """Shapes: as the latent's samples. No node arranges it. Raises ClipError for a latent of another size."""
        samples = input_latent["samples"].to(self._top)
        if samples.shape != self._top.shape:
            found, wanted = ("x".join(map(str, x.shape)) for x in (samples, self._top))
            raise ClipError(f"The latent at the sampler is {found} and the inverted clip {wanted} (frames, channels, "
                            "height, width). Connect the latent that went into DDIM Inversion.")  # fmt: skip
        below = self._prepare(samples) if samples.any() else samples
        return mark_whole((self._top - below) / self._scale)


def read_inversion(
    *,
    steps: int,
    scheduler: str,
    denoise: float,
    cfg: float,
    convention: str,
    keep_frames: int,
    reconstruct: bool,
    standardise: float = 0.0,
) -> Inversion:
    """Translate the widgets of DDIM Inversion. Raises ValueError for a choice that does not exist."""
    for name, choice, known in (("scheduler", scheduler, SCHEDULERS), ("convention", convention, CONVENTIONS)):
        check_choice(name, choice, known)
    return Inversion(steps, scheduler, denoise, cfg, Convention(convention), keep_frames, reconstruct, standardise)


def invert_clip(
    model: ModelPatcher, positive: list, latent: dict, how: Inversion, negative: list | None = None
) -> Inverted:
    """Lead a clean clip up to noise, from which the same MODEL and sampler come back to it.

    Raises ModelMismatchError and ClipError with a sentence for the user, before anything is loaded.
    """
    prediction = prediction_of(model)
    samples = _clean(model, latent)
    if negative is None and how.cfg != 1.0:
        raise ClipError(f"cfg is {how.cfg:g} and needs a negative prompt as well. Connect one to negative, or set cfg "
                        "to 1, which is usual for inversion.")  # fmt: skip
    if how.standardise and how.denoise < 1.0:
        raise ClipError(f"standardise is {how.standardise:g} and denoise is {how.denoise:g}, where the noisy clip is "
                        "not noise alone. Set denoise to 1, or standardise to 0.")  # fmt: skip
    sampling = model.get_model_object("model_sampling")
    hosts_own = comfy.samplers.KSampler(model, how.steps, "cpu", "euler", how.scheduler, how.denoise)
    sigmas = hosts_own.sigmas.cpu()
    ascent = plan_ascent(sigmas, how.convention, float(sampling.sigma_min), prediction)
    careful = model.clone()
    BareBounds().hang_on(careful, KEY)
    guider = comfy.samplers.CFGGuider(careful)
    guider.inner_set_conds({"positive": positive} | ({} if negative is None else {"negative": negative}))
    guider.set_cfg(how.cfg)
    total = ascent.steps * (2 if how.check else 1)
    told = latent_preview.prepare_callback(model, total)
    keep = min(how.keep, len(samples)) if samples.ndim == 4 else 0
    way = WayUp(ascent, keep)
    top = _run(guider, samples, way.sampler(), ascent.heard, lambda i, x0, x, _: told(i, x0, x, total))
    if how.standardise:
        top = _standardised(model, top, sigmas, how.standardise)
    error = nan
    if how.check:
        euler = comfy.samplers.sampler_object("euler")
        back = _run(guider, top, euler, sigmas, lambda i, x0, x, _: told(ascent.steps + i, x0, x, total))
        error = relative_rmse(back, samples)
    out = {key: value for key, value in latent.items() if key != "noise_mask"} | {"samples": top}
    return Inverted(out, InvertedNoise(model, top, sigmas), sigmas, way.path(), error)


def _clean(model: ModelPatcher, latent: dict) -> Tensor:
    """The clip as the sampler takes it, float32. Raises what a person would ask about later."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise ClipError("The latent holds picture and sound together, which cannot be inverted. Connect the pictures.")
    if not samples.any():
        raise ClipError("The latent is empty, so there is nothing to invert. Connect the clip: VAE Encode makes a "
                        "latent of its images.")  # fmt: skip
    samples = comfy.sample.fix_empty_latent_channels(model, samples).float()
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ModelMismatchError(f"The latent has {samples.shape[1]} channels and this MODEL samples {channels}. "
                                 "Encode the clip with the VAE that belongs to the MODEL.")  # fmt: skip
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, REUSE):
        raise ModelMismatchError("This MODEL has Reuse and Diffuse, which leads clips and would lead this one astray. "
                                 "Connect the MODEL from before that node.")  # fmt: skip
    return samples


def _standardised(model: ModelPatcher, top: Tensor, sigmas: Tensor, share: float) -> Tensor:
    """The noisy clip from noise nearer to mean 0 and deviation 1. Shapes: as a LATENT holds it -> the same."""
    into, out_of = (model.get_model_object(f"process_latent_{way}") for way in ("in", "out"))
    scale = noise_scale(model.get_model_object("model_sampling"), sigmas)
    return out_of(standardise(into(top) / scale, share) * scale)


def _run(guider: Any, samples: Tensor, sampler: Any, sigmas: Tensor, callback: Callable) -> Tensor:
    """The host's sampling run without noise: from samples, as a LATENT holds them, to such samples."""
    found = guider.sample(torch.zeros_like(samples), samples, sampler, sigmas, callback=callback, seed=0,
                          disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED)  # fmt: skip
    return found.to(comfy.model_management.intermediate_device())


class WayUp:
    """A sampler function of the host that goes from a clean clip to noise, and keeps the last frames of each level."""

    def __init__(self, ascent: Ascent, keep: int) -> None:
        self.ascent, self.keep = ascent, keep
        self._states: list[Tensor] = []

    def sampler(self) -> comfy.samplers.KSAMPLER:
        return comfy.samplers.KSAMPLER(self.ddim_inversion)

    def path(self) -> Trajectory:
        """Of the run that is over. Shapes: states (steps + 1, keep, c, h, w) on the CPU, in the sampler's scale."""
        return Trajectory(self.ascent.levels, torch.stack(self._states))

    def ddim_inversion(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """As the host's sampler functions, whose model it calls; `sigmas` is what the network will be told."""
        ascent = Ascent(self.ascent.levels.to(x), self.ascent.told.to(x), self.ascent.prediction)
        ones = x.new_ones(x.shape[0])

        def denoise(shown: Tensor, told: Tensor) -> Tensor:
            lead_hooks(model.inner_model, sigmas, told)
            return model(shown, told * ones, **extra_args)

        self._store(x)
        for number in trange(ascent.steps, disable=disable):
            comfy.model_management.throw_exception_if_processing_interrupted()
            x, clean = climb(denoise, x, ascent, number)
            self._store(x)
            if callback is not None:
                told = ascent.told[number]
                callback({"x": x, "i": number, "sigma": told, "sigma_hat": told, "denoised": clean})
        return x

    def _store(self, x: Tensor) -> None:
        self._states.append(x[len(x) - self.keep :].to("cpu", copy=True))


def lead_hooks(guider: Any, schedule: Tensor, sigma: Tensor) -> None:
    """Bring schedules of hooks to a level of the way up: by themselves they only go forward, from noise to clip.

    schedule: falling; the levels above `sigma` are those a sampling run would have told before it.
    """
    groups = [cond["hooks"] for conds in guider.conds.values() for cond in conds if cond.get("hooks") is not None]
    hooks = [hook for group in groups for hook in group.hooks if len(hook.hook_keyframe.keyframes) > 1]
    if hooks:
        guider.model_patcher.clear_cached_hook_weights()
    for hook in hooks:
        hook.initialize_timesteps(guider.inner_model)
        for level in schedule[schedule > sigma].tolist():
            hook.hook_keyframe.prepare_current_keyframe(level, {"sample_sigmas": schedule})
