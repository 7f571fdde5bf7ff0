"""A recipe tells everything a run depends on: every field changes something, and a file tells it as it is."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latentmotion.motion_modules.errors import TrainingError
from latentmotion.training.checkpoint import read_recipe, save_weights
from latentmotion.training.clips import stratified
from latentmotion.training.diffusion import LOSS_OF
from latentmotion.training.loop import Recipe, Stopped, fit
from latentmotion.training.recipe import LOSSES, chosen
from torch import Tensor, nn

BASE = Recipe("base", steps=6, batch=4, learning_rate=0.05, warmup=3, weight_decay=0.1, clip_norm=0.5, average=0.5)
CHANGES: dict[str, Any] = {
    "name": "other", "steps": 7, "batch": 3, "learning_rate": 0.04, "warmup": 0, "final_rate": 0.5,
    "weight_decay": 0.0, "clip_norm": 0.1, "average": 0.0, "seed": 1, "accumulate": 2, "beta2": 0.9, "ceiling": 2.0,
    "about": "other clips", "likeness": (0.1, 0.2),
    "trains": ("to_q",), "loss": "huber", "frames_seen": 2, "levels": ((0.5, 1.0),), "precision": "bfloat16",
    "recompute": True, "optimiser": "Muon",
}  # fmt: skip
LEARNED_OTHERWISE = ("steps", "batch", "learning_rate", "warmup", "final_rate", "weight_decay", "clip_norm", "average",
                     "seed", "accumulate", "beta2")  # fmt: skip


def learned(recipe: Recipe, state: Path | None = None, stop_at: int = -1) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer, steps = nn.Linear(3, 1), []

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(recipe.batch, 3, generator=generator)
        return (layer(x) - 3 * x.square().sum(1, keepdim=True)).square().mean()

    def should_stop() -> bool:
        steps.append(1)
        return len(steps) == stop_at

    return fit(dict(layer.named_parameters()), loss_of, recipe, state, should_stop=should_stop)


@pytest.mark.parametrize("name", LEARNED_OTHERWISE)
def test_the_numbers_change_what_is_learned(name: str) -> None:
    plain, other = learned(BASE), learned(replace(BASE, **{name: CHANGES[name]}))
    assert not torch.equal(plain["weight"], other["weight"])


def test_every_field_but_checkpointing_makes_another_run(tmp_path: Path) -> None:
    assert CHANGES.keys() == {item.name for item in fields(Recipe)}
    for name, value in CHANGES.items():
        other = replace(BASE, **{name: value})
        assert other.differences(BASE.told()) == ([] if name == "recompute" else [name])
        with pytest.raises(Stopped):
            learned(BASE, tmp_path / name, stop_at=2)
        seen: list[int] = []
        layer = nn.Linear(3, 1)
        fit(dict(layer.named_parameters()), lambda *_, layer=layer: layer.weight.sum(), other, tmp_path / name,
            on_step=lambda step, *_, seen=seen: seen.append(step))  # fmt: skip
        assert seen[0] == (3 if name == "recompute" else 1), name


def test_an_older_recipe_says_less_and_a_newer_one_more() -> None:
    told = BASE.told()
    del told["levels"], told["trains"]
    assert not BASE.differences(told)
    assert BASE.differences(told | {"momentum": 0.5}) == ["momentum"]


def test_a_file_tells_the_recipe(tmp_path: Path) -> None:
    recipe = replace(BASE, **CHANGES)
    save_weights(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, recipe.told())
    read = read_recipe(tmp_path / "x.safetensors")
    assert read == recipe.told() and not recipe.differences(read)
    assert read["trains"] == ["to_q"] and read["levels"] == [[0.5, 1.0]] and read["optimiser"] == "Muon"


@pytest.mark.parametrize(("name", "value"), [
    ("loss", "l7"), ("optimiser", "SGD"), ("precision", "float8"), ("levels", ()), ("levels", ((0.5, 0.5),)),
    ("levels", ((0.0, 2.0),)),
])  # fmt: skip
def test_what_no_run_can_do_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} (is|are)"):
        replace(BASE, **{name: value})


def test_levels_are_spread_evenly_over_their_ranges() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = stratified(1000, 1000, generator)
    assert torch.equal(whole, torch.arange(1000))
    halves = stratified(8, 1000, generator, ((0.0, 1.0), (0.85, 1.0)))
    assert [int(at) // 250 for at in halves[:4]] == [0, 1, 2, 3]
    assert ((halves[4:] >= 850) & (halves[4:] < 1000)).all()
    single = torch.cat([stratified(1, 1000, generator, ((0.0, 0.1), (0.9, 1.0))) for _ in range(200)])
    low = (single < 100).float().mean()
    assert ((single < 100) | (single >= 900)).all() and 0.35 < low < 0.65


def test_losses() -> None:
    assert tuple(LOSS_OF) == LOSSES
    error = torch.tensor([-0.01, 0.0, 0.01, 100.0])
    small, large = (LOSS_OF["huber"](error) / LOSS_OF["mse"](error))[[0, 3]]
    assert float(small) == pytest.approx(1.0, abs=1e-2) and float(large) < 0.03
    assert torch.equal(LOSS_OF["mse"](error), error**2)


def test_names_are_chosen_by_their_parts() -> None:
    names = ["a.to_q", "a.to_k", "b.to_q"]
    assert chosen(names, ()) == names and chosen(names, ("b.", "to_k")) == ["a.to_k", "b.to_q"]
    with pytest.raises(TrainingError, match="layers says c, and no layer is named so"):
        chosen(names, ("to_q", "c"))
