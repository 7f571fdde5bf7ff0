"""Reuse and Diffuse goes on from a clip that was inverted: its path takes the place of the states of a clip before."""

from __future__ import annotations

from collections.abc import Callable

import comfy.samplers
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, relative_error
from latentmotion.host.invert import Inversion, invert_clip
from latentmotion.host.reuse import apply_reuse
from latentmotion.motion_modules.errors import ClipError
from latentmotion.sampling.inversion import Trajectory
from latentmotion.sampling.reuse import Guidance, Reuse
from latentmotion.sampling.windows import PlanError
from test_invert import clip, formula
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

N, STEPS = 4, 5


def draw(model: ModelPatcher, noise: Tensor, scheduler: str = "ddim_uniform", steps: int = STEPS) -> Tensor:
    conds = tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2)
    return comfy.sample.sample(model, noise, steps, 1.0, "euler", scheduler, *conds, torch.zeros_like(noise), seed=0,
                               disable_pbar=True)  # fmt: skip


def path_of(model: ModelPatcher, frames: int = 6, **settings: float) -> Trajectory:
    how = Inversion(**{"steps": STEPS, "keep": 16, "check": False} | settings)
    return invert_clip(model, tiny_host.conditioning(model, 1), clip(frames), how).path


def noise_of(seed: int = 0) -> Tensor:
    return torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", Guidance)
def test_the_path_leads_as_the_states_of_a_sampled_clip(guidance: Guidance, pair: Pair) -> None:
    """A run of two clips, and its second clip alone with the first one's states as the path: the same clip."""
    model, reuse = formula(pair.plain), Reuse(N, 2, 4.0, 0.8, guidance)
    first, fresh = noise_of(1), noise_of(2)
    both = draw(apply_reuse(model, reuse), torch.cat([first, fresh]))
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS)
    states: list[Tensor] = []
    conds = tiny_host.conditioning(model, 1), tiny_host.conditioning(model, 2)
    last = comfy.sample.sample(model, first, STEPS, 1.0, "euler", "ddim_uniform", *conds, torch.zeros_like(first),
                               callback=lambda i, x0, x, n: states.append(x.clone()), disable_pbar=True)  # fmt: skip
    path = Trajectory(sigmas.flip(0), torch.stack([last * 0.18215, *reversed(states)]))
    second = draw(apply_reuse(model, reuse, path=path), fresh)
    assert relative_error(second, both[N:]) < 1e-5
    assert relative_error(second, draw(model, fresh)) > 0.05


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "normal", "karras"])
def test_an_inverted_clip_is_continued_with_any_schedule(scheduler: str, pair: Pair) -> None:
    """Led to the end, the first frame is the clip's last one, whatever levels the sampler visits."""
    model, old = formula(pair.plain), clip(6)["samples"]
    settings = {"steps": 20, "scheduler": "ddim_uniform"}
    made = draw(apply_reuse(model, Reuse(N, 2, 4.0, 1.0), path=path_of(model, **settings)), noise_of(), scheduler, 20)
    assert relative_error(made[0], old[-1]) < 1e-4
    free = draw(apply_reuse(model, Reuse(N, 2, 4.0, 0.0), path=path_of(model, **settings)), noise_of(), scheduler, 20)
    unled = draw(model, noise_of(), scheduler, 20)
    distance = [float((x[0] - old[-1]).square().mean().sqrt()) for x in (free, unled)]
    assert distance[0] < 0.7 * distance[1], "its noise alone leads close to the frame"


def test_impossible_paths_are_refused(pair: Pair, run_node: Callable) -> None:
    model = formula(pair.plain)
    widgets = {"clip_length": N, "prompt_frames": 2, "alpha": 1.0, "beta": 0.5, "guidance": "paper"}
    with pytest.raises(ClipError, match="both continue_from and continue_from_path"):
        run_node("LatentMotionReuseAndDiffuse", model=model, continue_from=clip(), continue_from_path=path_of(model),
                 **widgets)  # fmt: skip
    for path, sentence in ((path_of(model, keep=0), "continue_from_path has 0 frames, fewer than the 4 of a new clip"),
                           (path_of(model, 3), "has 3 frames, .* Raise keep_frames of DDIM Inversion")):  # fmt: skip
        (led,) = run_node("LatentMotionReuseAndDiffuse", model=model, continue_from_path=path, **widgets)
        with pytest.raises(ClipError, match=sentence):
            draw(led, noise_of())
    low = path_of(model, denoise=0.3)
    with pytest.raises(PlanError, match="Set denoise of DDIM Inversion to 1"):
        draw(apply_reuse(model, Reuse(N, 2), path=low), noise_of())
