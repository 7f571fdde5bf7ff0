"""One training loop: float32 masters, warm-up and cosine decay, averaged weights, resume and cancel."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..motion_modules.errors import TrainingError
from .checkpoint import load_state, save_state
from .muon import Muon
from .precision import Masters
from .recipe import Recipe


class Stopped(Exception):
    """Training was asked to stop; its state is on disk."""


LossFunction = Callable[[int, torch.Generator], torch.Tensor]
"""(number of the batch, generator seeded for that batch) -> scalar loss."""
OPTIMISER_OF = {"AdamW": torch.optim.AdamW, "Muon": Muon}
MOST_BAD = 20  # steps in a row whose gradients are not finite
GOOD = 500  # steps after which a scale that was halved is doubled


def fit(
    parameters: dict[str, nn.Parameter],
    loss_of: LossFunction,
    recipe: Recipe,
    state_path: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    save_every_s: float = 120.0,
    save_every: int = 0,
    losses: list[float] | None = None,
    loss_scale: float = 1.0,
    finish: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train `parameters` in place and return their averaged values in float32, keyed as they came.

    Every batch draws from a generator seeded by the recipe and its number, so an interrupted run that goes on from
    `state_path` sees the same numbers as one that was never interrupted. The state is written every `save_every`
    steps and `save_every_s` seconds, and when anything ends the run between its first step and its last.
    losses: gets the loss of every step, of those before an interruption too.
    loss_scale: factor that keeps float16 gradients from vanishing; halved, and the step left out, when they overflow,
    and doubled again after many steps that did not.
    finish: gets the result while the state is still there, so that what cannot be written is not lost.
    Raises Stopped when `should_stop()` says so, TrainingError when the loss is not a number any more.
    """
    run = _Run(parameters, recipe, [] if losses is None else losses, loss_scale)
    run.resume(state_path)
    saved = time.monotonic()
    try:
        while run.step < recipe.steps:
            run.advance(loss_of)
            if should_stop is not None and should_stop():
                raise Stopped(f"{recipe.name} stopped after {run.step} of {recipe.steps} steps")
            if on_step:
                on_step(run.step, recipe.steps, run.losses[-1])
            due = time.monotonic() - saved > save_every_s or (save_every and run.step % save_every == 0)
            if state_path and due:
                run.save(state_path)
                saved = time.monotonic()
        if finish:
            finish(run.average)
    except BaseException:
        if state_path and run.consistent and run.step:
            run.save(state_path)
        raise
    if state_path:
        state_path.unlink(missing_ok=True)
    return run.average


class _Run:
    """What changes while a run goes on."""

    def __init__(self, parameters: dict[str, nn.Parameter], recipe: Recipe, losses: list[float], scale: float) -> None:
        self.recipe, self.losses, self.scale, self.top = recipe, losses, scale, scale
        self.good = self.bad = 0  # steps in a row whose gradients were finite, or were not
        self.masters = Masters(parameters)
        tensors = self.masters.tensors
        how = {"weight_decay": recipe.weight_decay, "betas": (0.9, recipe.beta2)}
        self.optimiser = OPTIMISER_OF[recipe.optimiser](tensors.values(), lr=0.0, **how)
        self.average = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.step = 0
        self.consistent = True  # weights, optimiser, average and step belong together

    def advance(self, loss_of: LossFunction) -> None:
        """One step: gradients of as many batches as the recipe adds up, then the update."""
        recipe, tensors = self.recipe, self.masters.tensors
        total = 0.0
        for number in range(self.step * recipe.accumulate, (self.step + 1) * recipe.accumulate):
            loss = loss_of(number, torch.Generator().manual_seed(recipe.seed * 1_000_003 + number))
            (loss * (self.scale / recipe.accumulate)).backward()
            total += loss.item()
        self.masters.pull(self.scale)
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), recipe.clip_norm)
        self.consistent = False
        if torch.isfinite(norm):
            for group in self.optimiser.param_groups:
                group["lr"] = recipe.rate(self.step)
            self.optimiser.step()
            self.masters.push()
            _update_average(self.average, tensors, min(recipe.average, (1 + self.step) / (10 + self.step)))
            self.good, self.bad = self.good + 1, 0
            self.scale = min(self.top, self.scale * 2) if self.good % GOOD == 0 else self.scale
        else:
            self.good, self.bad = 0, self.bad + 1
            self.scale = max(1.0, self.scale / 2)
        self.optimiser.zero_grad(set_to_none=True)
        self.losses.append(total / recipe.accumulate)
        self.step += 1
        if self.bad >= MOST_BAD:
            raise TrainingError(
                f"{recipe.name}: the loss is not a number any more since step {self.step - self.bad + 1}, so nothing "
                "can be learned from it. Lower learning_rate, and begin again with existing at 'start over'."
            )
        self.consistent = True

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {
            "recipe": self.recipe.told(),
            "step": self.step,
            "weights": {name: tensor.detach() for name, tensor in self.masters.tensors.items()},
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "losses": self.losses,
            "scale": self.scale,
            "good": self.good,
            "bad": self.bad,
        }
        save_state(path, state)

    def resume(self, path: Path | None) -> None:
        """Take up the state of an interrupted run of the same recipe, if there is one."""
        state = load_state(path) if path else None
        if state is None or self.recipe.differences(state["recipe"]):
            return
        self.masters.load(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
        self.step, self.scale = state["step"], state.get("scale", self.scale)
        self.good, self.bad = state.get("good", 0), state.get("bad", 0)
        self.losses[:] = state.get("losses", [])


@torch.no_grad()
def _update_average(average: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], decay: float) -> None:
    torch._foreach_lerp_(list(average.values()), [t.detach() for t in tensors.values()], 1.0 - decay)
