"""What a training was begun with, in the words of the nodes' widgets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..training.recipe import Recipe

ALL_ALIKE, HALF_NOISIEST = "all alike", "half from the noisiest"
LEVELS = {ALL_ALIKE: ((0.0, 1.0),), HALF_NOISIEST: ((0.0, 1.0), (0.85, 1.0))}
ALL_LAYERS = ".to_"
"""What the names of all layers that a MotionLoRA or adapter can change have in common."""
WIDGETS = {"batch": "batch_size", "ceiling": "high_noise_weight", "levels": "noise_levels", "trains": "layers"}
"""Fields of a recipe whose widgets have other names."""
IDENTITY = ("about", "likeness")
"""Fields that tell the clips and models apart; the first also holds settings, see `Training.settings`."""
MATERIAL = ("clips", "models", "sampling")


def other_settings(recipe: Recipe, began: Mapping[str, Any], material: str) -> list[str]:
    """What a run of `recipe` does otherwise than the one that `began`: "batch_size 4 (now 1)" and so on.

    material: clips and models, in words, for where those are others.
    """
    other, now = recipe.differences(began), recipe.told()
    said = [_change(WIDGETS.get(name, name), began[name], now.get(name)) for name in other if name not in IDENTITY]
    before, after = (_about(told.get("about", "")) for told in (began, now))
    settings = [name for name in before.keys() | after.keys() if name not in MATERIAL]
    changed = [_change(name, before.get(name, "something else"), after.get(name)) for name in sorted(settings)
               if before.get(name) != after.get(name)]  # fmt: skip
    own = [name for name in MATERIAL if before.get(name) != after.get(name)]
    unsaid = "likeness" in other or ("about" in other and (own or not changed))
    return said + changed + [material] * bool(unsaid)


def _about(text: str) -> dict[str, Any]:
    try:
        held = json.loads(text)
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _change(name: str, before: Any, now: Any) -> str:
    return f"{name} {_said(before)} (now {_said(now)})"


def _said(value: Any) -> str:
    """A value of a recipe as its widget shows it."""
    if not isinstance(value, list):
        return f"{value:g}" if isinstance(value, float) else str(value)
    known = [choice for choice, levels in LEVELS.items() if [list(part) for part in levels] == value]
    return next(iter(known), ", ".join("empty" if part == ALL_LAYERS else part for part in _parts(value)))


def _parts(values: list) -> Iterator[str]:
    for value in values:
        yield f"{value[0]:g} to {value[1]:g}" if isinstance(value, list) else str(value)
