"""Networks of the host as the fixed part of a training run: unchanged, not copied, and as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def training() -> Iterator[None]:
    """Leave inference mode and no-grad, which the host runs its nodes in, until the context ends."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """While the context lasts, gradients pass through the networks and reach none of their weights.

    Tensors made in inference mode may not be saved for a backward pass. Every weight and buffer is therefore replaced
    by an ordinary tensor on the same memory, which asks for no gradient; afterwards the objects that were there are
    put back, so their `requires_grad` was never touched.
    """
    saved: list[tuple[dict, str, torch.Tensor]] = []
    views: dict[int, torch.Tensor] = {}  # tied weights stay tied
    try:
        for module in (module for network in networks for module in network.modules()):
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and type(tensor) in (torch.Tensor, nn.Parameter):
                        saved.append((table, name, tensor))
                        view = views.setdefault(id(tensor), _on_same_memory(tensor))
                        table[name] = view
        yield
    finally:
        for table, name, tensor in reversed(saved):
            table[name] = tensor


def _on_same_memory(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """While the context lasts, each of the layers keeps its input only and is computed anew in the backward pass.

    What the layers are made of (hooks, norms put in their place) must stay until the backward pass is over.
    """
    with ExitStack() as stack:
        for layer in layers:
            before = vars(layer).get("forward")
            stack.callback(_put_back, layer, before)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield


def _put_back(layer: nn.Module, forward: object) -> None:
    del layer.forward
    if forward is not None:
        layer.forward = forward
