"""The one place that decides how large a piece of work may be, and what happens when memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import comfy.model_management
import torch

from ..motion_modules.call import SLAB_BYTES_CPU, SLAB_BYTES_GPU

RUN = "latentmotion_memory"  # in transformer_options: the MemoryRun of this sampling run
LEAST_SLAB = 2**20
MOST_WINDOWS = 8
BUSY_PIXELS = 2**17  # latent pixels in a call that keep a GPU busy: two prompts of 16 frames of 512x512
RESERVE = 128 * 2**20  # kept free beside what the host reserves by itself
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory")  # RuntimeErrors of torch that say so
MIB = 2**20
T = TypeVar("T")
log = logging.getLogger(__name__)


def slab_bytes(device: torch.device) -> int:
    """Ceiling on one temporary of a motion module: what stays in a CPU's cache, or keeps a GPU busy."""
    return SLAB_BYTES_CPU if device.type == "cpu" else SLAB_BYTES_GPU


def park(frames: torch.Tensor, reserve: int) -> torch.Tensor:
    """Put frames away until they are needed again: where they are while `reserve` bytes stay free, else in RAM.

    Where they lie changes no value, so free memory may decide it.
    """
    if frames.device.type == "cpu" or comfy.model_management.get_free_memory(frames.device) > reserve + frames.nbytes:
        return frames
    return frames.to("cpu")


@dataclass
class MemoryRun:
    """What a sampling run has learnt about memory; it lasts as long as the run.

    slab: ceiling on one temporary in bytes, 0 for the device's own. apart: one conditioning per call of the UNet.
    windows: of a long clip, in one call. shape: of one conditioning's share of a call with one window, as the host
    asked for its memory. needed: bytes such a call takes, as estimated. told: the user knows.
    notes: what else the node is to say.
    """

    slab: int = 0
    apart: bool = False
    windows: int = 1
    told: bool = False
    shape: list[int] = field(default_factory=list)
    needed: int = 0
    notes: list[str] = field(default_factory=list)

    def __deepcopy__(self, memo: dict) -> MemoryRun:
        """Copies of a run's options share it."""
        return self

    def slab_on(self, device: torch.device) -> int:
        return self.slab or slab_bytes(device)

    def split_conditionings(self) -> str | None:
        """Take conditionings one by one from now on; None where they are taken so already."""
        if self.apart:
            return None
        self.apart = True
        return "the positive and the negative prompt one after the other"

    def halve_windows(self) -> str | None:
        """Take half as many windows at once from now on; None where they are taken one by one already."""
        if self.windows == 1:
            return None
        self.windows //= 2
        return f"{self.windows} window{'s' * (self.windows > 1)} at once"

    def halve_slab(self, device: torch.device) -> str | None:
        """Halve the pieces that motion modules work in; None where they are as small as they get."""
        half = self.slab_on(device) // 2
        if half < LEAST_SLAB:
            self.apart = True  # the call was for one conditioning, and there is nothing left to split
            return None
        self.slab = half
        return f"motion modules in pieces of {half // MIB} MiB"

    @property
    def words(self) -> str:
        """What of it the end of a line on a node says."""
        return in_words(self.needed) + ", in smaller pieces since it ran out" * self.told

    def tell(self, how: str) -> None:
        if not self.told:
            log.warning("Out of memory while sampling. The call is repeated with %s, and again with less where that "
                        "is not enough; the clip stays the same, it takes a little longer.", how)  # fmt: skip
        self.told = True


def windows_in(transformer_options: dict) -> int:
    """Windows of a long clip in one call. Where memory runs out, whoever put several together takes fewer."""
    return getattr(transformer_options.get("context_window"), "windows", 1)


def run_of(transformer_options: dict) -> MemoryRun:
    """This run's state; outside a run one that knows of no batches of conditionings to split."""
    return transformer_options.get(RUN) or MemoryRun(apart=True)


def is_out_of_memory(error: Exception) -> bool:
    hosts_own = getattr(comfy.model_management, "is_oom", None)
    known = hosts_own(error) if hosts_own else isinstance(error, comfy.model_management.OOM_EXCEPTION)
    return known or isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def with_less(call: Callable[[], T], lessen: Callable[[], str | None], run: MemoryRun, device: torch.device) -> T:
    """The result of `call`; where memory runs out, free what can be, ask for less and call again.

    lessen: makes the next call need less and says how, or None when it cannot, and then the host's error goes on.
    Random numbers drawn by the call that failed are drawn again. `call` must not change its inputs.
    """
    random = _random_state(device)
    while True:
        try:
            return call()
        except Exception as error:
            how = lessen() if is_out_of_memory(error) else None
            if how is None:
                raise
        run.tell(how)  # outside the handler: the error held the failed call's tensors
        comfy.model_management.soft_empty_cache()
        for restore, state in random:
            restore(state)


def _random_state(device: torch.device) -> list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]:
    room = getattr(torch, device.type, None)
    places = [torch, room] if hasattr(room, "get_rng_state") else [torch]
    return [(place.set_rng_state, place.get_rng_state()) for place in places]


@contextmanager
def counted(model: Any, need: Callable[[list[int], int], int], run: MemoryRun, device: torch.device) -> Iterator[None]:
    """While the context lasts, the host's question how much memory a call of `model` needs is answered for us too.

    need: bytes of a call from its input shape and slab size. The host's own answer counts where it is larger: layers
    run one after another, so the peaks of the UNet's and of ours do not add up.
    """
    hosts_own, before = model.memory_required, vars(model).get("memory_required")

    def memory_required(input_shape: Any, *args: Any, **kwargs: Any) -> float:
        shape = list(input_shape)
        if not run.shape or math.prod(shape) < math.prod(run.shape):
            run.shape = shape
        if run.apart:
            return math.inf  # what never fits, the host takes one by one
        return max(hosts_own(input_shape, *args, **kwargs), need(shape, run.slab_on(device)))

    model.memory_required = memory_required
    try:
        yield
    finally:
        del model.memory_required
        if before is not None:
            model.memory_required = before


def plan(run: MemoryRun, need: Callable[[list[int], int], int], device: torch.device) -> str:
    """Choose the pieces of motion modules so that a call fits into free memory, tell the console; a line for the node.

    Their size changes no value, so free memory may decide it.
    """
    free, reserve = _free(device)
    while need(run.shape, run.slab_on(device)) > free - reserve and run.slab_on(device) >= 2 * LEAST_SLAB:
        run.slab = run.slab_on(device) // 2
    frames, channels, height, width = run.shape
    run.needed = need(run.shape, run.slab_on(device))
    run.windows = 1
    while device.type != "cpu" and run.windows < MOST_WINDOWS:
        images = 4 * run.windows * frames  # twice as many windows, of two prompts
        needed = need([images, channels, height, width], run.slab_on(device))
        if images * height * width > BUSY_PIXELS or needed > free - reserve:
            break
        run.windows *= 2
    log.info("Memory: one UNet call on %d frames of %dx%d latents needs about %d MiB for each prompt, with motion "
             "modules in pieces of %d MiB; %d MiB are free, of which %d stay in reserve.", frames, height, width,
             math.ceil(run.needed / MIB), run.slab_on(device) // MIB, free // MIB, reserve // MIB)  # fmt: skip
    return f"{frames} frames at once{in_words(run.needed)} of {int(free) // MIB} MiB free"


def fitting(size: int, need: Callable[[int], int], device: torch.device, work: str) -> tuple[int, str]:
    """Largest of size, size / 2, ... whose need leaves the reserve free, at least 1, and a line for the node.

    For pieces whose size changes no value. work: what is done, for the line. The console is told, too.
    """
    free, reserve = _free(device)
    while size > 1 and need(size) > free - reserve:
        size //= 2
    frames = f"{size} frame{'s' * (size > 1)}"
    line = f"{work} {frames} at once{in_words(need(size))} of {int(free) // MIB} MiB free"
    log.info("Memory: %s, of which %d MiB stay in reserve.", line, reserve // MIB)
    return size, line


def beyond(needed: int, device: torch.device) -> int:
    """How many of so many bytes have no room on the device beside the reserve; all of them where it is the CPU."""
    if device.type == "cpu":
        return needed
    free, reserve = _free(device)
    return max(0, needed - max(0, int(free) - reserve))


def in_words(needed: int) -> str:
    """An estimate as the end of a line on a node, empty for none."""
    return f", about {math.ceil(needed / MIB)} MiB" if needed else ""


def _free(device: torch.device) -> tuple[float, int]:
    """Free bytes, and how many of them are to stay so."""
    reserve = RESERVE + comfy.model_management.extra_reserved_memory()
    return comfy.model_management.get_free_memory(device), reserve
