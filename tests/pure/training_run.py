"""A run that test_training_resume.py starts in a process of its own, kills, and goes on with."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from latentmotion.training.loop import Recipe, fit
from torch import nn

RECIPE = Recipe("wave", steps=40, batch=4, learning_rate=0.02, warmup=3, average=0.9, seed=7, accumulate=2)


def run(state: Path | None, log: list[float], pause: float = 0.0) -> dict[str, torch.Tensor]:
    """Fit a small network; every loss goes to `log`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))

    def loss_of(batch: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(RECIPE.batch, 3, generator=generator)
        time.sleep(pause)
        return (network(x) - x.square().sum(1, keepdim=True)).square().mean()

    return fit(dict(network.named_parameters()), loss_of, RECIPE, state, save_every=5, losses=log)
