"""Low-rank changes to linear layers, live while they are trained and written in the published key layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from ..motion_modules.animatediff.lora import published_key
from .recipe import chosen


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

    @torch.no_grad()
    def take(self, published: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the values of a file with these changes. published: the layers' names there, in the order of ours."""
        for name, change in zip(published, self.changes, strict=True):
            change.down.copy_(tensors[f"{published_key(name)}.down.weight"])
            change.up.copy_(tensors[f"{published_key(name)}.up.weight"])

    def pairs(self, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Layer name, down and up of every change, from `weights` keyed as this module's parameters."""
        for index, name in enumerate(self.names):
            yield name, weights[f"changes.{index}.down"], weights[f"changes.{index}.up"]


def attention_layers(network: nn.Module, parts: Sequence[str]) -> list[str]:
    """Names of the projections of a motion module's attentions that hold one of `parts`, all of them for none.

    Raises TrainingError where a part is in no name.
    """
    linear = (name for name, layer in network.named_modules() if isinstance(layer, nn.Linear))
    return chosen((name for name in linear if ".to_" in name), parts)


def published_pairs(changes: LowRankSet, scale: float, weights: dict[str, torch.Tensor],
                    names: dict[str, str] | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """The changes as tensors of a file under the authors' keys, the scale multiplied in, as none of them holds one.

    names: published names of the layers, where they have others in the network.
    """
    pairs = {}
    for layer, down, up in changes.pairs(weights):
        key = published_key(names[layer] if names else layer)
        pairs[f"{key}.down.weight"], pairs[f"{key}.up.weight"] = down, up * scale
    return pairs


def _adder(change: LowRank) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + change(args[0])

    return hook
