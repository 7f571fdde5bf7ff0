"""One training loop: AdamW on float32 masters, warm-up and cosine decay, averaged weights, resume and cancel."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_state, save_state
from .precision import Masters


@dataclass(frozen=True)
class Recipe:
    """What a run depends on. A saved state is taken up again only by the same recipe."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    final_rate: float = 0.02  # share of the learning rate left at the end
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.998  # decay of the averaged weights
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine."""
        ramp = min(1.0, (step + 1) / max(self.warmup, 1))
        wave = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.learning_rate * ramp * (self.final_rate + (1 - self.final_rate) * wave)


class Stopped(Exception):
    """Training was asked to stop; its state is on disk."""


LossFunction = Callable[[int, torch.Generator], torch.Tensor]
"""(step, generator seeded for that step) -> scalar loss."""


def fit(
    parameters: dict[str, nn.Parameter],
    loss_of: LossFunction,
    recipe: Recipe,
    state_path: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    save_every_s: float = 120.0,
) -> dict[str, torch.Tensor]:
    """Train `parameters` in place and return their averaged values in float32, keyed as they came.

    Every step draws from a generator seeded by (recipe.seed, step), so an interrupted run that goes on from
    `state_path` sees the same numbers as one that was never interrupted. Raises Stopped when `should_stop()` says so.
    """
    masters = Masters(parameters)
    optimiser = torch.optim.AdamW(masters.tensors.values(), lr=0.0, weight_decay=recipe.weight_decay, betas=(0.9, 0.99))
    average = {name: tensor.detach().clone() for name, tensor in masters.tensors.items()}
    start = _resume(state_path, recipe, masters, optimiser, average)
    saved = time.monotonic()
    for step in range(start, recipe.steps):
        loss = loss_of(step, torch.Generator().manual_seed(recipe.seed * 1_000_003 + step))
        loss.backward()
        masters.pull()
        torch.nn.utils.clip_grad_norm_(masters.tensors.values(), recipe.clip_norm)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        masters.push()
        _update_average(average, masters.tensors, min(recipe.average, (1 + step) / (10 + step)))
        if on_step:
            on_step(step + 1, recipe.steps, loss.item())
        stop = should_stop is not None and should_stop()
        if state_path and (stop or time.monotonic() - saved > save_every_s):
            _save(state_path, recipe, step + 1, masters, optimiser, average)
            saved = time.monotonic()
        if stop:
            raise Stopped(f"{recipe.name} stopped after {step + 1} of {recipe.steps} steps")
    if state_path:
        state_path.unlink(missing_ok=True)
    return average


@torch.no_grad()
def _update_average(average: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], decay: float) -> None:
    torch._foreach_lerp_(list(average.values()), [t.detach() for t in tensors.values()], 1.0 - decay)


def _save(
    path: Path, recipe: Recipe, step: int, masters: Masters, optimiser: torch.optim.Optimizer, average: dict
) -> None:
    state: dict[str, Any] = {
        "recipe": asdict(recipe),
        "step": step,
        "weights": {name: tensor.detach() for name, tensor in masters.tensors.items()},
        "optimiser": optimiser.state_dict(),
        "average": average,
    }
    save_state(path, state)


def _resume(
    path: Path | None, recipe: Recipe, masters: Masters, optimiser: torch.optim.Optimizer, average: dict
) -> int:
    state = load_state(path, asdict(recipe)) if path else None
    if state is None:
        return 0
    masters.load(state["weights"])
    optimiser.load_state_dict(state["optimiser"])
    for name, tensor in average.items():
        tensor.copy_(state["average"][name])
    return state["step"]
