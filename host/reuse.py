"""Reuse and Diffuse on the host's samplers: one sampling run, clip after clip, each clip step by step.

The host's sampler functions are run one step at a time, on two neighbouring sigmas. For a sampler that keeps nothing
from step to step this is the same computation, bit for bit, and between two steps the state is ours to replace: the
sampler's own x, not only what the model is shown.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from tqdm.auto import tqdm

from ..motion_modules.errors import ClipError, ModelMismatchError
from ..sampling.inversion import Trajectory
from ..sampling.reuse import Reuse, States, sample_clip
from .bounds import BareBounds
from .caches import fresh_cache
from .conditioning import ControlSlices, cut_conds
from .context import ContextWindow
from .memory import MemoryRun, run_of
from .preview import Page, watching_page
from .schedule import noise_scale

KEY = "latentmotion_reuse"
ONE_STEP_SAMPLERS = (
    "euler",
    "euler_cfg_pp",
    "heun",
    "dpm_2",
    "euler_ancestral",
    "euler_ancestral_cfg_pp",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp",
    "ddpm",
    "lcm",
)
"""Sampler functions of the host whose every step starts from x alone; `ddim` is the host's `euler`."""
COUNT_STEPS = ("s_churn", "s_noise_end")  # options whose effect depends on the number of steps of a call


def apply_reuse(
    model: ModelPatcher, reuse: Reuse, former: dict | None = None, path: Trajectory | None = None
) -> ModelPatcher:
    """Return a clone of MODEL that samples long batches clip after clip; settings put on it before are replaced.

    former: LATENT of a finished clip that the first one continues. path: the same clip at every noise level.
    """
    samples = None if former is None else former["samples"].detach().clone()
    if samples is not None and path is not None:
        raise ClipError("Reuse and Diffuse has both continue_from and continue_from_path, and can continue one clip. "
                        "Disconnect one of them; the path leads more exactly.")  # fmt: skip
    model = model.clone()
    run = ReuseRun(reuse, samples, path)
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, run.sample), (WrappersMP.PREPARE_SAMPLING, run.plan_memory)):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    BareBounds().hang_on(model, KEY)
    return model


@dataclass(frozen=True, eq=False)
class ReuseRun:
    """Wraps a sampling run of the host. former: (frames, c, h, w) of the clip to continue, as a LATENT holds it.

    path: of the clip to continue the last frames at every noise level, as a sampler holds them.
    """

    reuse: Reuse
    former: Tensor | None = None
    path: Trajectory | None = None

    def __deepcopy__(self, memo: dict) -> ReuseRun:
        """Immutable, so copies of a model's options share it."""
        return self

    def sample(self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kw: Any) -> Tensor:
        """Hand the host a sampler that goes clip by clip; refuse what would not be right before anything is loaded."""
        alone = self.former is None and self.path is None
        if noise.shape[0] == self.reuse.length and alone and noise.ndim == 4:
            return executor(noise, latent_image, sampler, *args, **kw)
        check_clips(self.reuse, noise)
        check_sampler(sampler)
        if executor.class_obj.model_options.get("context_handler") is not None:
            raise ClipError(
                "This MODEL has context windows as well as Reuse and Diffuse, which are two ways to make a "
                "long clip. Take one of the two nodes off it."
            )
        if self.former is not None:
            check_former(self.former, noise, "continue_from", self.reuse.prompt_frames, "prompt_frames that lead the "
                         "new clip. Lower prompt_frames, or connect the whole clip")  # fmt: skip
        if self.path is not None:
            check_former(self.path.states[-1], noise, "continue_from_path", self.reuse.length, "of a new clip. Raise "
                         "keep_frames of DDIM Inversion to clip_length, or lower clip_length")  # fmt: skip
        return executor(noise, latent_image, ClipByClip(sampler, self.reuse, self.former, self.path), *args, **kw)

    def plan_memory(self, executor: Callable, model: Any, noise_shape: Any, *args: Any, **kw: Any) -> Any:
        """Let the host reserve memory for one clip."""
        return executor(model, [min(noise_shape[0], self.reuse.length), *noise_shape[1:]], *args, **kw)


def check_clips(reuse: Reuse, noise: Tensor) -> None:
    """Raises ClipError unless the batch is a whole number of clips."""
    frames = noise.shape[0]
    if noise.ndim != 4:
        raise ClipError(
            "Reuse and Diffuse needs latents with a frame each. This model's have a time axis, one latent "
            "for several frames, and cannot be reversed. Take the node off the MODEL."
        )
    if frames == 0 or frames % reuse.length:
        near = max(1, round(frames / reuse.length)) * reuse.length
        raise ClipError(
            f"The batch holds {frames} frames, which is no whole number of clips of {reuse.length}. Set "
            f"batch_size of the Empty Latent Image node to {near}, or change clip_length on Reuse and "
            "Diffuse."
        )


def check_sampler(sampler: Any) -> None:
    """Raises ModelMismatchError, naming the sampler, unless its steps can be taken one by one."""
    name = sampler_name(sampler)
    known = ", ".join(sorted((*ONE_STEP_SAMPLERS, "ddim")))
    hosts_own = getattr(comfy.k_diffusion.sampling, f"sample_{name}", None)
    if name not in ONE_STEP_SAMPLERS or sampler.sampler_function is not hosts_own:
        raise ModelMismatchError(
            f"Reuse and Diffuse cannot lead a clip with the sampler {name}: it remembers earlier "
            f"steps or places its own, which replaced states would spoil. Choose one of {known}."
        )
    for option in COUNT_STEPS:
        if sampler.extra_options.get(option):
            raise ModelMismatchError(
                f"Reuse and Diffuse takes the steps of the sampler {name} one by one, and its "
                f"setting {option} spreads over all of them. Set {option} to 0."
            )


def sampler_name(sampler: Any) -> str:
    """The host's name of a SAMPLER; that of its class where it has none."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")


def check_former(former: Tensor, noise: Tensor, name: str, needed: int, cure: str) -> None:
    """Raises ClipError unless the first clip can be led by this one, which came in by input `name`."""
    if former.shape[1:] != noise.shape[1:]:
        found, wanted = ("x".join(map(str, x.shape[1:])) for x in (former, noise))
        raise ClipError(
            f"The latent at {name} has frames of {found} (channels, height, width) and the one at "
            f"the sampler {wanted}. Make the new clip as large as the one it continues."
        )
    if former.shape[0] < needed:
        raise ClipError(f"The latent at {name} has {former.shape[0]} frames, fewer than the {needed} {cure}.")


@dataclass(eq=False)
class ClipByClip(comfy.samplers.Sampler):
    """A sampler of the host, run once for every clip of a batch."""

    inner: comfy.samplers.KSAMPLER
    reuse: Reuse
    former: Tensor | None = None
    path: Trajectory | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """As the host's samplers: from noise of unit variance and latents, (clips N, c, h, w), to latents."""
        n, steps = self.reuse.length, len(sigmas) - 1
        # Without noise this run goes on from one that ended early: its frames are on their way and not led again.
        reuse = self.reuse if noise.any() else replace(self.reuse, beta=0.0)
        states = States(reuse, steps)
        own, done = noise[:n], []
        if self.former is not None:
            self._continue(states, model_wrap.inner_model, sigmas, own)
        if self.path is not None and noise.any():
            own = self._follow(states, model_wrap.inner_model.model_sampling, sigmas, own)
        with tqdm(total=noise.shape[0] // n * steps, disable=disable_pbar) as bar:
            memory = run_of(extra_args["model_options"].get("transformer_options", {}))
            report = Report(callback, noise.shape[0] // n, steps, memory, watching_page())
            for number, start in enumerate(range(0, noise.shape[0], n)):
                frames = slice(start, start + n)
                own = reuse.next_noise(own, noise[frames]) if number else own
                mask = None if denoise_mask is None else denoise_mask[frames]
                window = ContextWindow(list(range(start, start + n)), 0, noise.shape[0])
                report.number = number
                with conds_of_clip(model_wrap, noise, window):
                    done.append(self._stepper(states, bar).sample(
                        model_wrap, sigmas, args_of_clip(extra_args, window, number), report.tell, own,
                        latent_image[frames], mask, disable_pbar))  # fmt: skip
        return torch.cat(done)

    def _continue(self, states: States, model: Any, sigmas: Tensor, noise: Tensor) -> None:
        """Let the finished clip lead: its last frames, brought to each noise level with the new clip's own noise."""
        latent = model.process_latent_in(self.former.to(noise))
        for state, count in states.counts.items():
            own = noise[:count].flip(0)
            states.keep(model.model_sampling.noise_scaling(sigmas[state], own, latent[-count:], False), state)

    def _follow(self, states: States, model_sampling: Any, sigmas: Tensor, fresh: Tensor) -> Tensor:
        """Let the inverted clip lead as a clip that was just sampled would; returns the new clip's starting noise."""
        for state in states.counts:
            states.keep(self.path.at(float(sigmas[state])).to(fresh), state)
        top = self.path.at(float(sigmas[0]))[-self.reuse.length :].to(fresh)
        return self.reuse.next_noise(top / noise_scale(model_sampling, sigmas), fresh)

    def _stepper(self, states: States, bar: tqdm) -> comfy.samplers.KSAMPLER:
        """The host's sampler with its loop over the steps replaced by ours."""
        function = self.inner.sampler_function

        def run(
            model: Any,
            x: Tensor,
            sigmas: Tensor,
            extra_args: dict,
            callback: Callable | None = None,
            disable: bool = False,
            **options: Any,
        ) -> Tensor:
            if "noise_sampler" in inspect.signature(function).parameters and options.get("noise_sampler") is None:
                draw = comfy.k_diffusion.sampling.default_noise_sampler(x, seed=extra_args.get("seed"))
                options["noise_sampler"] = draw  # one for all steps, or each would draw the same

            def step(x: Tensor, s: int) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                heard = callback and (lambda info: callback({**info, "i": s}))
                x = function(
                    model, x, sigmas[s : s + 2], extra_args=dict(extra_args), callback=heard, disable=True, **options
                )
                bar.update()
                return x

            return sample_clip(step, x, len(sigmas) - 1, states)

        stepper = copy.copy(self.inner)
        stepper.sampler_function = run
        return stepper


@contextmanager
def conds_of_clip(guider: Any, x: Tensor, window: ContextWindow) -> Iterator[None]:
    """The guider holds the conditioning of one clip while the context lasts; schedules in it begin anew."""
    whole = guider.conds
    for group in (cond["hooks"] for conds in whole.values() for cond in conds if cond.get("hooks") is not None):
        for hook in group.hooks:
            hook.initialize_timesteps(guider.inner_model)
    controls = ControlSlices()
    guider.conds = {key: cut_conds(conds, x, window, controls, guider.inner_model) for key, conds in whole.items()}
    try:
        yield
    finally:
        guider.conds = whole


def args_of_clip(extra_args: dict, window: ContextWindow, number: int) -> dict:
    """The sampler's arguments for one clip: its frames, as neighbours read them, and a seed of its own."""
    options, seed = extra_args["model_options"], extra_args.get("seed")
    told = options.get("transformer_options", {})
    inner = {**told, **fresh_cache(told), "context_window": window}
    return {**extra_args, "model_options": {**options, "transformer_options": inner},
            "seed": None if seed is None else seed + number}  # fmt: skip


@dataclass(eq=False)
class Report:
    """Tells the host's callback of steps: counted over all clips, and at the very end with the whole batch."""

    callback: Callable | None
    clips: int
    steps: int
    memory: MemoryRun
    page: Page | None = None
    number: int = 0
    last: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def tell(self, step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if self.page is not None:
            line = f"clip {self.number + 1}/{self.clips}, step {step + 1}/{self.steps}"
            self.page.say(line + self.memory.words)
        if step == self.steps - 1:
            self.last.append((denoised, x))
            if self.number == self.clips - 1:  # nodes with an output for it keep what they heard last
                denoised, x = (torch.cat(parts) for parts in zip(*self.last, strict=True))
        if self.callback is not None:
            self.callback(self.number * self.steps + step, denoised, x, self.clips * self.steps)
