"""Muon: a step moves a matrix as far in all its directions.

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the size of a step and the
decay of the weights are those of Liu et al., arXiv 2502.16982, section 2.2, which make one learning rate serve tensors
of all sizes. torch has a Muon from 2.9 on, which takes no kernels of convolutions; hosts run older versions too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
LIKE_ADAMW = 0.2  # what the elements of AdamW's step measure, root mean square, in parts of its rate
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that brings singular values towards 1
ITERATIONS = 5
AT_ONCE = 2**24  # numbers in matrices that are made orthogonal together


class Muon(torch.optim.AdamW):
    """Steps along the orthogonal matrix nearest to the momentum; AdamW for tensors that are no matrices.

    Kernels of convolutions count as matrices with a row for each output. Keeps one number for each number that is
    trained, AdamW two. A step takes some 30 operations for each of them and each row (or column, if there are fewer).
    """

    def __init__(self, tensors: Iterable[Tensor], lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        every = list(tensors)
        groups = [{"params": [t for t in every if (t.ndim > 1) == flat], "matrices": flat} for flat in (True, False)]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, betas=betas)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = (group for group in self.param_groups if group["matrices"])
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for tensor in group["params"]:
            if tensor.grad is not None:
                alike[tensor.flatten(1).shape].append(tensor)
        for shape, tensors in alike.items():
            together = max(1, AT_ONCE // shape.numel())
            for first in range(0, len(tensors), together):
                self._move(tensors[first : first + together], group["lr"], group["weight_decay"])
        super().step()

    def _move(self, tensors: list[Tensor], rate: float, decay: float) -> None:
        """A step of tensors that are matrices of one shape."""
        updates = orthogonal(torch.stack([self._update(tensor).flatten(1) for tensor in tensors]))
        size = LIKE_ADAMW * max(updates.shape[1:]) ** 0.5 * rate
        for tensor, update in zip(tensors, updates, strict=True):
            tensor.mul_(1 - rate * decay)
            tensor.sub_(update.view(tensor.shape), alpha=size)
            tensor.grad = None  # so AdamW leaves it out

    def _update(self, tensor: Tensor) -> Tensor:
        """The momentum a step ahead (Nesterov). Shapes: any -> the same."""
        if not self.state[tensor]:  # AdamW asks every tensor for its "step" when a state is read
            self.state[tensor] = {"step": torch.zeros(()), "momentum": torch.zeros_like(tensor)}
        momentum = self.state[tensor]["momentum"].lerp_(tensor.grad, 1 - MOMENTUM)
        return tensor.grad.lerp(momentum, MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are alike, between 0.7 and 1.2, by Newton and Schulz's iteration.

    Shapes: (n, rows, columns) -> the same.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
