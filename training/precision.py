"""bfloat16 arithmetic over float32 weights, and the memory layout CPU convolutions want."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    faster = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # 1.7 times as fast on a Zen 4 core
    known = any(getattr(torch.cpu, name, lambda: False)() for name in faster)
    return torch.bfloat16 if device.type == "cpu" and known else torch.float32


class Masters:
    """float32 copies of trainable parameters that may live in a narrower type inside their network.

    The optimiser sees `tensors`; `pull()` fetches gradients from the network, `push()` writes the weights back.
    Parameters that are float32 already are used as they are.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.tensors = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in parameters.items()
        }
        self._narrow = [name for name, p in parameters.items() if p is not self.tensors[name]]

    def pull(self, scale: float = 1.0) -> None:
        """Fetch the gradients of a loss that was multiplied by `scale`, and divide them by it."""
        for name in self._narrow:
            grad = self.parameters[name].grad
            self.tensors[name].grad = None if grad is None else grad.float()
            self.parameters[name].grad = None
        if scale != 1.0:
            torch._foreach_div_([t.grad for t in self.tensors.values() if t.grad is not None], scale)

    @torch.no_grad()
    def push(self) -> None:
        if self._narrow:
            torch._foreach_copy_([self.parameters[n] for n in self._narrow], [self.tensors[n] for n in self._narrow])

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(weights[name])
        self.push()


@contextmanager
def planar_norms(network: nn.Module) -> Iterator[None]:
    """Give GroupNorm planar input while everything around it stays channels-last.

    torch's CPU kernel for the backward pass of a channels-last GroupNorm with few channels per group is tens of times
    slower than the planar one; two copies cost next to nothing.
    """
    hooks = []
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            hooks.append(module.register_forward_pre_hook(_to_planar))
            hooks.append(module.register_forward_hook(_to_channels_last))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _to_planar(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].contiguous(),)


def _to_channels_last(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last) if output.ndim == 4 else output
