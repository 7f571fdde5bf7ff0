"""The noise a diffusion model is trained against."""

from __future__ import annotations

from collections.abc import Callable

import torch

STEPS = 1000
BETAS = (0.00085, 0.012)  # first and last, as Stable Diffusion and AnimateDiff have them


def alphas_cumprod(schedule: str) -> torch.Tensor:
    """Share of the signal's variance left at each of the 1000 steps: (1000,), float32.

    Names are the field's: `scaled_linear` (Stable Diffusion; the square roots of the betas are equally spaced) and
    `linear` (AnimateDiff; the betas are).
    """
    first, last = BETAS
    if schedule == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, STEPS, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(first, last, STEPS, dtype=torch.float64)
    else:
        raise ValueError(f"unknown noise schedule {schedule!r}")
    return torch.cumprod(1.0 - betas, dim=0).float()


def add_noise(latents: torch.Tensor, noise: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Shapes: latents, noise (n, c, h, w), kept (n,), the share of the signal's variance -> (n, c, h, w)."""
    kept = kept.view(-1, 1, 1, 1)
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise


def noise_error(predicted: torch.Tensor, noise: torch.Tensor, kept: torch.Tensor | None = None,
                ceiling: float = 1.0) -> torch.Tensor:  # fmt: skip
    """Mean squared error of the predicted noise, in float32; with `kept`, samples weigh 1 / kept, at most `ceiling`.

    With `ceiling` 1 this is the plain loss of Ho et al. (arXiv 2006.11239, eq. 14). Unbounded, it is the error in the
    velocity of Salimans and Ho (arXiv 2202.00512, appendix D), which gives the noisiest steps, where a caption
    decides what is drawn, as much to learn as the others. Shapes: (n, c, h, w) twice, (n,).
    """
    error = (predicted.float() - noise.float()).square().mean((1, 2, 3))
    if kept is None:
        return error.mean()
    return (error * (1 / kept).clamp(max=ceiling).to(error.device)).mean()


def squared(error: torch.Tensor) -> torch.Tensor:
    """Shapes: any -> the same."""
    return error.square()


def huber(error: torch.Tensor) -> torch.Tensor:
    """As `squared` for small errors and linear in large ones, so that odd clips count less. Shapes: any -> the same.

    Source: Song and Dhariwal, arXiv 2310.14189, section 3.3, with c = 1 and scaled to the square's curvature at 0.
    """
    return 2.0 * ((error.square() + 1.0).sqrt() - 1.0)


LOSS_OF = {"mse": squared, "huber": huber}


def euler(clean_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], start: torch.Tensor,
          sigmas: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Follow the noise down: at each level, towards what `clean_of(x, sigma)` takes for the picture without noise.

    Shapes: start as the latents, sigmas (steps + 1,), falling to 0. Source: Karras et al., arXiv 2206.00364, algorithm
    1 without churn and correction.
    """
    x = start
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        x = x + (x - clean_of(x, sigma)) * ((following - sigma) / sigma)
    return x
