"""Prompts that change from frame to frame: lines of "frame: prompt" to the share of each prompt in any frame."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

EXAMPLE = '"24: a red circle" or "24 * 0.5: a red circle"'
HEAD = re.compile(r"(\d{1,9})\s*(?:\*\s*(.*))?", re.ASCII)


class TravelError(ValueError):
    """Lines that are no prompt travel; the message names the line and says what to write."""


class Interpolation(str, Enum):
    """What a frame between two keyframes sees."""

    LINEAR = "linear"
    EASED = "eased"
    HOLD = "hold"

    def progress(self, way: float) -> float:
        """Share of the later keyframe, `way` of the way there. way: 0 to 1. Eased: 3 w^2 - 2 w^3."""
        if self is Interpolation.HOLD:
            return 0.0
        return way if self is Interpolation.LINEAR else way * way * (3 - 2 * way)


@dataclass(frozen=True)
class Keyframe:
    """frame: counted from 0. shares: (number of the prompt, its share), which sum to 1."""

    frame: int
    shares: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        return " + ".join(f"{share:.0%} [{number + 1}]" for number, share in self.shares)


@dataclass(frozen=True)
class Travel:
    """Different prompts, and keyframes in the order of their frames."""

    prompts: tuple[str, ...]
    keyframes: tuple[Keyframe, ...]
    interpolation: Interpolation = Interpolation.LINEAR

    def weights(self, frames: Sequence[int]) -> Tensor:
        """Share of every prompt in these frames; before the first and after the last keyframe nothing changes.

        Shapes: -> (frames, prompts), float64, rows that sum to 1.
        """
        return torch.tensor([self._row(frame) for frame in frames], dtype=torch.float64).view(-1, len(self.prompts))

    def _row(self, frame: int) -> list[float]:
        after = bisect_right(self.keyframes, frame, key=lambda key: key.frame)
        here, then = self.keyframes[max(after - 1, 0)], self.keyframes[min(after, len(self.keyframes) - 1)]
        way = (frame - here.frame) / (then.frame - here.frame) if here.frame < frame < then.frame else 0.0
        progress = self.interpolation.progress(way)
        row = [0.0] * len(self.prompts)
        for key, part in ((here, 1.0 - progress), (then, progress)):
            for number, share in key.shares:
                row[number] += part * share
        return row

    def table(self) -> str:
        """What each range of frames sees, one line each, and the prompts by their numbers."""
        rows, begin = [], 0
        for here, then in zip(self.keyframes, self.keyframes[1:], strict=False):
            if self.interpolation is Interpolation.HOLD or here.shares == then.shares:
                rows.append((_range(begin, then.frame - 1), str(here)))
            else:
                rows.append((_range(begin, here.frame), str(here)))
                if then.frame - here.frame > 1:
                    change = f"{here} -> {then}, {self.interpolation.value}"
                    rows.append((_range(here.frame + 1, then.frame - 1), change))
            begin = then.frame
        rows.append((f"{begin} on", str(self.keyframes[-1])))
        width = max(len(frames) for frames, _ in rows)
        lines = [f"{frames.ljust(max(width, 6))}  {said}" for frames, said in [("frames", "prompts"), *rows]]
        return "\n".join([*lines, "", *(f"[{i}] {text}" for i, text in enumerate(self.prompts, 1))])


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def parse_travel(
    text: str, interpolation: Interpolation = Interpolation.LINEAR, before: str = "", after: str = ""
) -> Travel:
    """Read lines of "frame: prompt" or "frame * weight: prompt", in any order; lines that begin with # are comments.

    Lines of one frame are mixed in the proportion of their weights, 1 where none is given. before, after: put round
    every prompt, with a space between. Raises TravelError, naming the line.
    """
    found: dict[int, dict[str, float]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            frame, weight, prompt = _read_line(number, line.strip())
            prompt = " ".join(part for part in (before.strip(), prompt, after.strip()) if part)
            mixed = found.setdefault(frame, {})
            mixed[prompt] = mixed.get(prompt, 0.0) + weight
    if not found:
        raise TravelError(f"There is no prompt to travel from. Write one line per keyframe, such as {EXAMPLE}.")
    prompts: dict[str, int] = {}
    keyframes = []
    for frame, mixed in sorted(found.items()):
        total = sum(mixed.values())
        shares = [(prompts.setdefault(prompt, len(prompts)), weight / total) for prompt, weight in mixed.items()]
        keyframes.append(Keyframe(frame, tuple(sorted(shares))))
    return Travel(tuple(prompts), tuple(keyframes), interpolation)


def _read_line(number: int, line: str) -> tuple[int, float, str]:
    """Frame, weight and prompt of one line."""
    head, colon, prompt = (part.strip() for part in line.partition(":"))
    if not colon:
        raise TravelError(f'Line {number}, "{_short(line)}", has no colon. Write the frame, a colon and the prompt: '
                          f"{EXAMPLE}. A prompt stays on one line.")  # fmt: skip
    match = HEAD.fullmatch(head)
    if match is None:
        raise TravelError(f'Line {number} begins with "{_short(head)}", which is no frame number. Frames are whole '
                          f"numbers from 0, at most 999999999: {EXAMPLE}.")  # fmt: skip
    if not prompt:
        raise TravelError(f"Line {number} has no prompt behind frame {match[1]}. Write {EXAMPLE}, or put # in front.")
    return int(match[1]), _read_weight(number, match[2]), prompt


def _read_weight(number: int, text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 1e-6 <= weight <= 1e6:
        raise TravelError(f'Line {number} has the weight "{_short(text)}". A weight is a number above 0 (and at most a '
                          f"million), which counts relative to the other lines of its frame: {EXAMPLE}.")  # fmt: skip
    return weight


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
