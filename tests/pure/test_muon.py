"""Muon steps along orthogonal matrices, and is AdamW for what are no matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from latentmotion.training import muon
from latentmotion.training.loop import Recipe, Stopped, fit
from latentmotion.training.muon import Muon, orthogonal
from torch import nn

RECIPE = Recipe("m", steps=60, batch=8, learning_rate=0.1, warmup=3, weight_decay=0.0, average=0.0, optimiser="Muon")


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 8, 40), (1, 40, 8)])
def test_singular_values_become_alike_and_directions_stay(shape: tuple[int, ...]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sizes, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    values = (u.mT @ found @ v.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(u @ values.diag_embed() @ v, found, atol=1e-4, rtol=1e-4)
    assert values[sizes > 0.05 * sizes.max()].min() > 0.5 and values.max() < 1.3


def test_a_first_step_is_the_orthogonal_matrix_at_the_size_of_adamw():
    weight = nn.Parameter(torch.zeros(16, 8, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    expected = orthogonal(weight.grad.flatten(1)[None])[0].view(weight.shape)
    Muon([weight], lr=0.1, weight_decay=0.0, betas=(0.9, 0.99)).step()
    assert weight.grad is None
    torch.testing.assert_close(weight.detach(), -0.1 * muon.LIKE_ADAMW * 72**0.5 * expected, atol=1e-3, rtol=1e-2)
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.1 * muon.LIKE_ADAMW, rel=0.3)


def test_vectors_are_left_to_adamw():
    plain, beside = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    first = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99))
    second = Muon([nn.Parameter(torch.ones(2, 2)), beside], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99))
    for seed in range(4):
        plain.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        beside.grad = plain.grad.clone()
        first.step(), second.step()
    assert torch.equal(plain, beside)


def test_matrices_move_alike_however_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch):
    found = []
    for most in (1, 40, 2**20):
        monkeypatch.setattr(muon, "AT_ONCE", most)
        network, loss_of = _network()
        fit(dict(network.named_parameters()), loss_of, replace(RECIPE, steps=3))
        found.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_weights_decay_and_what_has_no_gradient_stays():
    weight, still = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight, still], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))
    assert torch.equal(still.detach(), torch.ones(4, 4))


def _network() -> tuple[nn.Sequential, object]:
    torch.manual_seed(0)
    network, target = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)), 0.3 * torch.randn(6, 6)

    def loss_of(number: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(RECIPE.batch, 6, generator=generator)
        return (network(x) - x @ target).square().mean()

    return network, loss_of


def test_it_learns_and_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    network, loss_of = _network()
    losses: list[float] = []
    whole = fit(dict(network.named_parameters()), loss_of, RECIPE, losses=losses)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    network, loss_of = _network()
    calls, state = iter(range(1000)), tmp_path / "state.pt"
    with pytest.raises(Stopped):
        fit(dict(network.named_parameters()), loss_of, RECIPE, state, should_stop=lambda: next(calls) == 25)
    network, loss_of = _network()
    resumed = fit(dict(network.named_parameters()), loss_of, RECIPE, state)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_it_is_another_run_than_adamw():
    assert RECIPE.differences(replace(RECIPE, optimiser="AdamW").told()) == ["optimiser"]
