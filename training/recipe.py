"""What a training run depends on, as its state on the disk and its file tell it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from operator import eq
from typing import Any

from ..motion_modules.errors import TrainingError, check_choice
from .likeness import alike

LOSSES = ("mse", "huber")
OPTIMISERS = {"AdamW": 2, "Muon": 1}  # and how many numbers each keeps beside one that is trained
PRECISIONS = ("", "float32", "bfloat16", "float16")
SAME_RESULT = "same result"  # marks what may differ between the parts of one run
LIKENESS = "likeness"  # marks what may differ by rounding
Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """What a run depends on. A saved state is taken up again only by the same recipe.

    Raises ValueError for a choice that does not exist and for ranges outside the schedule.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    final_rate: float = 0.02  # share of the learning rate left at the end
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.998  # decay of the averaged weights (EMA); 0: the last ones
    seed: int = 0
    accumulate: int = 1  # batches whose gradients make one step
    beta2: float = 0.99  # memory of AdamW for the size of gradients
    ceiling: float = 1.0  # how many times more the noisiest levels may count, see `noise_loss`
    about: str = ""  # of what is trained on what; another text is another run
    likeness: tuple[float, ...] = field(default=(), metadata={LIKENESS: True})  # of pictures and texts as read
    trains: tuple[str, ...] = ()  # parts of the names of what learns, none for all that could
    loss: str = "mse"  # of LOSSES
    frames_seen: int = 0  # of a clip by a step, drawn at random; 0: all
    levels: tuple[Range, ...] = ((0.0, 1.0),)  # of the schedule, from clean to noise; each gets as many samples
    optimiser: str = "AdamW"  # of OPTIMISERS
    precision: str = ""  # type that the network computes in, empty where nobody said; what learns is float32
    recompute: bool = field(default=False, metadata={SAME_RESULT: True})  # gradient checkpointing

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("optimiser", OPTIMISERS), ("precision", PRECISIONS)):
            check_choice(name, getattr(self, name), known)
        if not self.levels or not all(0.0 <= first < last <= 1.0 for first, last in self.levels):
            raise ValueError(f"levels are {self.levels}, where shares of the schedule such as (0.0, 1.0) are needed.")

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine."""
        ramp = min(1.0, (step + 1) / max(self.warmup, 1))
        wave = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.learning_rate * ramp * (self.final_rate + (1 - self.final_rate) * wave)

    def told(self) -> dict[str, Any]:
        """The recipe as files tell it: what JSON can hold, and reads back as the same."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Names of what another recipe tells otherwise and changes the result; what it leaves out is not compared.

        An older version wrote fewer of them. Whatever it wrote that is not known here is a difference.
        """
        now, told = self.told(), json.loads(json.dumps(dict(other)))
        free, close = ({item.name for item in fields(self) if mark in item.metadata}
                       for mark in (SAME_RESULT, LIKENESS))  # fmt: skip
        same = {name: alike if name in close else eq for name in now}
        return sorted(name for name in told.keys() - free if name not in now or not same[name](told[name], now[name]))


def chosen(names: Iterable[str], parts: Iterable[str]) -> list[str]:
    """The names that hold one of `parts`, all of them for none. Raises TrainingError where a part is in no name."""
    names, parts = list(names), list(parts)
    absent = [part for part in parts if not any(part in name for name in names)]
    if absent:
        first = names[0] if names else "missing"
        raise TrainingError(f"layers says {absent[0]}, and no layer is named so. Write parts of names such as to_q or "
                            f"up_blocks, or nothing for all; the first layer is {first}.")  # fmt: skip
    return [name for name in names if not parts or any(part in name for part in parts)]
