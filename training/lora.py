"""Low-rank changes to linear layers, live while they are trained and written in the published key layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from ..motion_modules.errors import TrainingError


class LowRank(nn.Module):
    """y -> y + scale * up(down(x)) for one linear layer; `up` starts at zero, so it starts as no change.

    Source: Hu et al., arXiv 2106.09685, section 4.1, without the alpha factor, as AnimateDiff's files have it.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        make = {"device": linear.weight.device, "dtype": torch.float32}
        down = torch.randn(rank, linear.in_features, generator=generator) / rank
        self.down = nn.Parameter(down.to(**make))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **make))
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        return functional.linear(functional.linear(x, down), up) * self.scale


class LowRankSet(nn.Module):
    """Low-rank changes to several layers of a network, by the layers' dotted names."""

    def __init__(self, network: nn.Module, names: list[str], rank: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.names = list(names)
        self.changes = nn.ModuleList([LowRank(network.get_submodule(name), rank, generator) for name in self.names])

    @contextmanager
    def on(self, network: nn.Module, scale: float = 1.0) -> Iterator[None]:
        """While the context lasts, the layers of `network` compute with these changes."""
        hooks = []
        try:
            for name, change in zip(self.names, self.changes, strict=True):
                change.scale = scale
                hooks.append(network.get_submodule(name).register_forward_hook(_adder(change)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def pairs(self, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Layer name, down and up of every change, from `weights` keyed as this module's parameters."""
        for index, name in enumerate(self.names):
            yield name, weights[f"changes.{index}.down"], weights[f"changes.{index}.up"]


def attention_layers(network: nn.Module, parts: Sequence[str]) -> list[str]:
    """Names of the projections of a motion module's attentions that hold one of `parts`, all of them for none.

    Raises TrainingError where a part is in no name.
    """
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and ".to_" in name]
    absent = [part for part in parts if not any(part in name for name in names)]
    if absent:
        raise TrainingError(f"layers says {absent[0]}, and no layer is named so. Write parts of names such as to_q or "
                            f"up_blocks, or nothing for all; the first layer is {names[0]}.")  # fmt: skip
    return [name for name in names if not parts or any(part in name for part in parts)]


def _adder(change: LowRank) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + change(args[0])

    return hook
