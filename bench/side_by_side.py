"""What every measurement shares: calls timed in turn, live memory counted, figures printed and written."""

from __future__ import annotations

import json
import platform
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, A B C A B C ..., after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(top: list[float], bottom: list[float]) -> float:
    """Median over the rounds of a ratio taken within each round."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the context that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, given)
        return out

    def _hold(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in given and not self._holders[key]:
            return  # a view of something that was there before, such as a weight
        if not self._holders[key]:
            self._live += size
            self.peak = max(self.peak, self._live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._live -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest number of bytes that one call holds at once beyond what was there before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counter:
        call()
    return counter.peak


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def report(figures: dict[str, float], path: str | None) -> None:
    """Print a table; write the same figures to a JSON file where one is named."""
    for name, value in figures.items():
        print(f"{name:44} {value:12.4f}")
    keep(figures, path)


def keep(figures: dict[str, float], path: str | None) -> None:
    """Write figures to a JSON file where one is named; of a run of hours what is measured so far outlives its end."""
    if path:
        beside = Path(f"{path}.part")
        beside.write_text(json.dumps(figures, indent=2) + "\n")
        beside.replace(path)
