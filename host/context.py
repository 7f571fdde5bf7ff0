"""Long clips: a handler on the host's own hook for context windows, with everything per frame cut to the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.context_windows import ContextHandlerABC
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..motion_modules.errors import ClipError
from ..sampling.fuse import FuseMethod, Fusion
from ..sampling.noise import NoiseKind, arrange_noise
from ..sampling.windows import Window, WindowPlan
from .bounds import BareBounds
from .caches import fresh_cache, works_in_windows
from .conditioning import ControlSlices, cut_conds, has_foreign_control
from .memory import run_of, with_less
from .preview import Page, show_previews, watching_page

KEY = "latentmotion_context"
RUN = "latentmotion_context_run"
HOSTS_OWN = "ContextWindows"  # how the keys begin of what the host's own context nodes put on a MODEL
SAG = "nodes_sag"  # part of the name that the host gives the module of that node
TICKS = 100  # of the progress bar, per sampling step


def frame_axis(x: Tensor | tuple[int, ...]) -> int:
    """Axis of the frames: time for 5-D latents, the batch for images."""
    dims = x.ndim if isinstance(x, Tensor) else len(x)
    return 2 if dims == 5 else 0


@dataclass(frozen=True)
class ContextWindow:
    """Frames of one call, as the host and neighbouring packs read them from `context_window`.

    windows: how many windows of equal length they are, one after the other.
    """

    index_list: list[int]
    dim: int
    total_frames: int
    windows: int = 1

    @property
    def context_length(self) -> int:
        return len(self.index_list) // self.windows

    def get_tensor(
        self, full: Tensor, device: Any = None, dim: int | None = None, retain_index_list: Any = ()
    ) -> Tensor:
        """The window's part of a tensor with an entry per frame on `dim`; one frame stands for all."""
        dim = self.dim if dim is None else dim
        if dim == 0 and full.shape[0] == 1:
            return full
        return full.index_select(dim, torch.tensor(self.index_list, device=full.device)).to(device)

    def add_window(self, full: Tensor, to_add: Tensor, dim: int | None = None) -> Tensor:
        index = torch.tensor(self.index_list, device=full.device)
        return full.index_add_(self.dim if dim is None else dim, index, to_add)


@dataclass
class ContextRun:
    """What lasts for one sampling run: ControlNets cut to windows, caches of windows, and the progress told so far."""

    bar: Any = None
    page: Page | None = None
    steps: int = 1
    told: int = 0
    controls: ControlSlices = field(default_factory=ControlSlices)
    caches: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)

    def cache_of(self, frames: tuple[int, ...], transformer_options: dict) -> dict[str, Any]:
        """What of the host's EasyCache belongs to the call on these frames."""
        if works_in_windows(transformer_options) and frames not in self.caches:
            self.caches[frames] = fresh_cache(transformer_options)
        return self.caches.get(frames, {})

    def tell(self, step: int, done: int, windows: int, memory: str) -> None:
        """Show a window of a step as progress, in words too; samplers that go back never move the bar back.

        memory: what the line says of it at its end.
        """
        self.told = max(self.told, step * TICKS + done * TICKS // windows)
        if self.bar is not None:
            self.bar.update_absolute(self.told)
        if self.page is not None:
            self.page.say(f"window {done + 1}/{windows}, step {step + 1}/{self.steps}{memory}")


@dataclass(frozen=True, eq=False)
class SlidingContext(ContextHandlerABC):
    """Samples a long clip window by window and fuses what the windows predict, at every step of the sampler."""

    plan: WindowPlan = WindowPlan()
    fuse: FuseMethod = FuseMethod.PYRAMID
    noise: NoiseKind = NoiseKind.INDEPENDENT

    @property
    def context_length(self) -> int:
        """Frames of a window, under the name it has in the host's own handlers."""
        return self.plan.length

    def __deepcopy__(self, memo: dict) -> SlidingContext:
        return self

    def should_use_context(self, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: dict) -> bool:
        return x_in.shape[frame_axis(x_in)] > self.plan.length

    def get_resized_cond(self, cond_in: list[dict], x_in: Tensor, window: ContextWindow, device: Any = None) -> list:
        return cut_conds(cond_in, x_in, window, ControlSlices(), None)

    def execute(
        self, calc_cond_batch: Callable, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Predictions for the whole clip, one tensor for each of `conds`."""
        options = model_options.get("transformer_options", {})
        run, memory = options.get(RUN) or ContextRun(), run_of(options)
        evaluation = Evaluation(calc_cond_batch, model, conds, x_in, timestep, model_options, run)
        axis = evaluation.axis
        step = step_of(timestep, options.get("sample_sigmas"))
        windows = self.plan.windows(x_in.shape[axis], step)
        fusions = [Fusion(x_in, axis, self.fuse, self.plan.overlap, self.plan.loops) for _ in conds]
        done = 0
        while done < len(windows):
            run.tell(step, done, len(windows), memory.words)
            rest = partial(evaluation.some, windows[done:])
            group, predicted = with_less(rest, memory.halve_windows, memory, x_in.device)
            for fusion, value in zip(fusions, predicted, strict=True):
                for window, part in zip(group, value.split(len(group[0]), axis), strict=True):
                    fusion.add(window, part)
            done += len(group)
        return [fusion.mean() for fusion in fusions]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of a model on a long clip, as the host asks for it; see SlidingContext.execute."""

    calc_cond_batch: Callable
    model: Any
    conds: list
    x: Tensor
    timestep: Tensor
    model_options: dict
    run: ContextRun

    @property
    def axis(self) -> int:
        return frame_axis(self.x)

    @property
    def together(self) -> int:
        """Windows that may go into one call. Frames on the batch axis can be of several, and ControlNets of other
        packs take the frames of a call for one clip."""
        options = self.model_options.get("transformer_options", {})
        return 1 if self.axis or any(has_foreign_control(cond) for cond in self.conds) else run_of(options).windows

    def some(self, windows: list[Window]) -> tuple[list[Window], list[Tensor]]:
        """The first of these windows, as many of equal length as fit into a call, and the predictions for them."""
        group = [window for window in windows[: self.together] if len(window) == len(windows[0])]
        comfy.model_management.throw_exception_if_processing_interrupted()
        frames = [index for window in group for index in window]
        window = ContextWindow(frames, self.axis, self.x.shape[self.axis], len(group))
        parts = [cut_conds(cond, self.x, window, self.run.controls, self.model) for cond in self.conds]
        single = self.timestep.shape[0] == 1 or self.axis
        times = self.timestep if single else window.get_tensor(self.timestep)
        told = self.model_options.get("transformer_options", {})
        options = {**told, **self.run.cache_of(tuple(frames), told), "context_window": window}
        x = window.get_tensor(self.x)
        inner = {**self.model_options, "transformer_options": options}
        return group, self.calc_cond_batch(self.model, parts, x, times.expand(x.shape[0]), inner)


def step_of(timestep: Tensor, sigmas: Tensor | None) -> int:
    """Number of the sampling step a noise level belongs to, also for levels a sampler takes between two steps."""
    if sigmas is None:
        return 0
    level = timestep.max().to(sigmas)
    # A hair of tolerance: the sampler's own arithmetic may have moved a level of the schedule by a rounding error.
    return max(0, int((sigmas[:-1] >= level * (1 - 1e-4)).sum()) - 1)


def apply_context(model: ModelPatcher, context: SlidingContext) -> ModelPatcher:
    """Return a clone of MODEL that samples long clips through windows; a context set before is replaced."""
    model = model.clone()
    model.model_options["context_handler"] = context
    for kind, wrappers in model.wrappers.items():
        for key in [key for key in wrappers if str(key).startswith(HOSTS_OWN)]:  # they read their own handler
            model.remove_wrappers_with_key(kind, key)
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, start_run), (WrappersMP.PREPARE_SAMPLING, plan_memory)):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    BareBounds().hang_on(model, KEY)
    show_previews(model)
    return model


def check_guidance(model_options: dict) -> None:
    """Raise ClipError where a node looks into one call of the model for the whole clip, and would see one window."""
    guides = model_options.get("sampler_post_cfg_function", ())
    if any(SAG in str(getattr(guide, "__module__", "")) for guide in guides):
        raise ClipError("Self-Attention Guidance looks at one call of the model and cannot follow the windows of "
                        "Sliding Context. Take it off, or use Perturbed-Attention Guidance.")  # fmt: skip


def start_run(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Any = None,
    callback: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Arrange the noise of a long clip and keep this run's state while it lasts."""
    guider = executor.class_obj
    context = guider.model_options.get("context_handler")
    axis = frame_axis(noise)
    if not isinstance(context, SlidingContext) or noise.shape[axis] <= context.plan.length:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
    check_guidance(guider.model_options)
    noise = arrange_noise(noise, context.noise, context.plan.length, context.plan.shared, axis, seed or 0)
    before = guider.model_options
    steps = max(1, len(sigmas) - 1)
    run = ContextRun(comfy.utils.ProgressBar(steps * TICKS), watching_page(), steps)
    guider.model_options = {**before, "transformer_options": {**before.get("transformer_options", {}), RUN: run}}
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
    finally:
        guider.model_options = before


def plan_memory(executor: Callable, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the host reserve memory for one window instead of the whole clip."""
    context = (kwargs.get("model_options") or getattr(model, "model_options", {})).get("context_handler")
    if isinstance(context, SlidingContext):
        noise_shape = list(noise_shape)
        axis = frame_axis(tuple(noise_shape))
        noise_shape[axis] = min(noise_shape[axis], context.plan.length)
    return executor(model, noise_shape, *args, **kwargs)
