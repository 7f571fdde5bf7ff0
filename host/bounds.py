"""What a MODEL with motion modules asks of the host's memory planning, and what its sampling runs do without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..motion_modules.animatediff.spec import JointNorms
from . import memory
from .clip_checks import check_one_clip
from .footprint import Footprint, Shape, footprint
from .preview import watching_page
from .unet import block_of


@dataclass(frozen=True, eq=False)
class Bounds:
    """Wraps a sampling run of the host. motions: modules with their settings, as Inflation has them."""

    motions: Sequence[Any]

    def __deepcopy__(self, memo: dict) -> Bounds:
        """Immutable, so copies of a run's options share it."""
        return self

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """OUTER_SAMPLE: keep what this run learns about memory while it lasts."""
        guider = executor.class_obj
        before = guider.model_options
        for motion in self.motions:
            noise = args[0] if args else kwargs["noise"]
            check_one_clip(before, noise.shape[0], motion.settings.frames)
        guider.model_options = _with_run(before, memory.MemoryRun())
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before

    def prepare(self, executor: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING: have the host reserve what the modules need, too, whatever cuts a long clip."""
        run = memory.run_of((kwargs.get("model_options") or {}).get("transformer_options", {}))
        if run.apart:
            run = memory.MemoryRun()  # no run of ours: nothing is learnt
        device = model.load_device

        def need(shape: list[int], slab: int) -> int:
            return self.footprint(model.model, shape, slab).peak

        with memory.counted(model.model, need, run, device):
            found = executor(model, *args, **kwargs)
        if run.shape:
            line, page = memory.plan(run, need, device), watching_page()
            if page is not None:
                page.say(" ".join([line, *run.notes]))
        return found

    def predict(
        self,
        executor: Callable,
        model: Any,
        conds: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """CALC_COND_BATCH: the host puts conditionings into one batch where ours fit, too; apart after running out."""
        told = model_options.get("transformer_options", {})
        run, windows = told.get(memory.RUN) or memory.MemoryRun(), memory.windows_in(told)
        options = _with_run(model_options, run)

        def need(shape: list[int], slab: int) -> int:
            return self.footprint(model, shape, slab, x.shape[0] // windows).peak

        def call() -> Any:
            with memory.counted(model, need, run, x.device):
                return executor(model, conds, x, timestep, options, *args, **kwargs)

        lessen = run.split_conditionings if windows == 1 else lambda: None  # fewer windows come before
        return memory.with_less(call, lessen, run, x.device)

    def footprint(self, base: Any, shape: Sequence[int], slab: int, frames: int = 0) -> Footprint:
        """Estimate one UNet call. shape: (images, c, h, w). frames: of a clip, where the settings leave it open."""
        unet, slots = base.diffusion_model, {}
        for motion in self.motions:
            for name, channels in motion.module.spec.slots:
                block = block_of(unet, motion.module.spec, name)
                slots.setdefault(block, []).append((channels, motion.joint.motion))
        joint = JointNorms(
            *(
                any(getattr(motion.joint, name) for motion in self.motions)
                for name in ("resnet", "out", "transformer", "motion")
            )
        )
        dtype = getattr(base, "manual_cast_dtype", None) or base.get_dtype()
        images, height, width = shape[0], *shape[-2:]
        clip = self.motions[0].settings.frames or frames or images
        size = Shape(images, height, width, comfy.model_management.dtype_size(dtype), min(clip, images), slab)
        return footprint(unet, slots, joint, size)


class BareBounds(Bounds):
    """For MODELs that may have no layers of ours: a call needs what the host says, and is taken apart as any other."""

    def __init__(self) -> None:
        super().__init__(())

    def footprint(self, base: Any, shape: Sequence[int], slab: int, frames: int = 0) -> Footprint:
        return Footprint()

    def hang_on(self, model: ModelPatcher, key: str) -> None:
        """Repeat calls of this MODEL, a clone, that run out of memory; beside the Bounds of modules it does nothing."""
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self.sample)
        model.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, key)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, self.predict)


def _with_run(model_options: dict, run: memory.MemoryRun) -> dict:
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), memory.RUN: run}}
