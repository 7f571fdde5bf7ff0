"""The training loop goes on where it was, stops when asked, and writes whole files only."""

from __future__ import annotations

import json
import os

import pytest
import torch
from latentmotion.training import checkpoint, diffusion
from latentmotion.training.attention import attention
from latentmotion.training.loop import Recipe, Stopped, fit
from latentmotion.training.lora import LowRankSet
from latentmotion.training.precision import Masters, planar_norms
from safetensors import safe_open
from small_disk import small_disk
from torch import nn

RECIPE = Recipe("line", steps=120, batch=8, learning_rate=0.05, warmup=5, weight_decay=0.0, average=0.9)


def _line() -> tuple[nn.Linear, object]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    target = torch.tensor([[1.0, -2.0, 0.5]])

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(RECIPE.batch, 3, generator=generator)
        return (layer(x) - x @ target.T - 0.3).square().mean()

    return layer, loss_of


def test_learns_a_line():
    layer, loss_of = _line()
    averaged = fit(dict(layer.named_parameters()), loss_of, RECIPE)
    assert torch.allclose(averaged["weight"], torch.tensor([[1.0, -2.0, 0.5]]), atol=0.02)
    assert torch.allclose(averaged["bias"], torch.tensor([0.3]), atol=0.02)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    layer, loss_of = _line()
    whole = fit(dict(layer.named_parameters()), loss_of, RECIPE)
    layer, loss_of = _line()
    calls = iter(range(1000))
    state = tmp_path / "state.pt"
    with pytest.raises(Stopped, match="41 of 120"):
        fit(dict(layer.named_parameters()), loss_of, RECIPE, state, should_stop=lambda: next(calls) == 40)
    assert state.is_file()
    layer, loss_of = _line()
    seen = []
    resumed = fit(dict(layer.named_parameters()), loss_of, RECIPE, state, on_step=lambda step, *_: seen.append(step))
    assert seen[0] == 42 and seen[-1] == 120
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name])
    assert not state.exists()


def test_the_state_of_another_recipe_is_not_taken_up(tmp_path):
    layer, loss_of = _line()
    state = tmp_path / "state.pt"
    with pytest.raises(Stopped):
        fit(dict(layer.named_parameters()), loss_of, RECIPE, state, should_stop=lambda: True)
    other = Recipe("line", steps=3, batch=8, learning_rate=0.05)
    seen = []
    fit(dict(layer.named_parameters()), loss_of, other, state, on_step=lambda step, *_: seen.append(step))
    assert seen == [1, 2, 3]


def test_learning_rate_warms_up_and_decays():
    rates = [RECIPE.rate(step) for step in range(RECIPE.steps)]
    assert rates[0] < rates[2] < rates[4]
    assert rates[-1] < 0.05 * max(rates)
    assert max(rates) <= RECIPE.learning_rate


def test_narrow_weights_gather_small_steps_in_their_masters():
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    masters = Masters(dict(layer.named_parameters()))
    before = layer.weight.detach().clone()
    step = before.float().abs().max().item() * 2**-10  # below half a unit of the last place of the largest weight
    for _ in range(64):
        with torch.no_grad():
            masters.tensors["weight"] += step
        masters.push()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.allclose(layer.weight.float(), before.float() + 64 * step, rtol=0.01, atol=step)


def test_gradients_reach_the_masters():
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    masters = Masters(dict(layer.named_parameters()))
    layer(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    masters.pull()
    assert masters.tensors["weight"].grad.dtype == torch.float32
    assert torch.equal(masters.tensors["bias"].grad, torch.full((4,), 2.0))
    assert layer.weight.grad is None


def test_planar_norms_change_no_value_and_leave_nothing_behind():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(32, 32), nn.Conv2d(32, 3, 3))
    network = network.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    plain = network(x)
    with planar_norms(network):
        inside = network(x)
    assert torch.allclose(plain, inside, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_low_rank_changes_start_as_none_and_equal_a_merged_weight():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    plain = network(x)
    changes = LowRankSet(network, ["0", "2"], rank=2, seed=1)
    with changes.on(network):
        assert torch.equal(network(x), plain)
    for change in changes.changes:
        nn.init.normal_(change.up)
    with changes.on(network, scale=0.5):
        changed = network(x)
    assert torch.equal(network(x), plain)
    with torch.no_grad():
        for name, down, up in changes.pairs(dict(changes.named_parameters())):
            network.get_submodule(name).weight += 0.5 * up @ down
    assert torch.allclose(network(x), changed, atol=1e-5)


def test_low_rank_training_leaves_the_network_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    before = network[0].weight.clone()
    changes = LowRankSet(network, ["0"], rank=3)
    target = torch.randn(3, 3)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        return (network(torch.eye(3)) - target).square().mean()

    with changes.on(network):
        first = loss_of(0, torch.Generator()).item()
        fit(dict(changes.named_parameters()), loss_of, RECIPE)
        assert loss_of(0, torch.Generator()).item() < 0.05 * first
    assert torch.equal(network[0].weight, before)


def test_noise_schedules_have_the_published_ends():
    scaled, linear = diffusion.alphas_cumprod("scaled_linear"), diffusion.alphas_cumprod("linear")
    for kept, last in ((scaled, 14.615), (linear, 25.146)):
        sigmas = ((1 - kept) / kept).sqrt()
        assert sigmas[0].item() == pytest.approx(0.02917, rel=1e-3)
        assert sigmas[-1].item() == pytest.approx(last, rel=1e-3)
    with pytest.raises(ValueError, match="cosine"):
        diffusion.alphas_cumprod("cosine")


def test_noise_keeps_the_variance_of_unit_latents():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 64, 4, 16, 16, generator=generator)
    noisy = diffusion.add_noise(latents, noise, torch.full((64,), 0.3))
    assert noisy.var().item() == pytest.approx(1.0, abs=0.02)
    assert torch.allclose(diffusion.add_noise(latents, noise, torch.ones(64)), latents)


@pytest.mark.parametrize("causal", [False, True])
def test_spelled_out_attention_is_attention(causal: bool):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 12)
    mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None
    split = [t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*split, is_causal=causal).transpose(1, 2).flatten(2)
    assert torch.allclose(attention(None, q, k, v, 3, mask=mask), expected, atol=1e-6)


def test_weights_are_written_whole_with_their_recipe(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "weights.safetensors"
    weights = {"a": torch.randn(3, 4), "b": torch.zeros(2)}
    checkpoint.save_weights(path, weights, {"steps": 3})
    assert checkpoint.read_recipe(path) == {"steps": 3}
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["recipe"]) == {"steps": 3}
        assert file.get_tensor("a").dtype == torch.float16
    assert torch.allclose(checkpoint.load_weights(path)["a"], weights["a"], rtol=1e-3, atol=1e-3)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_weights(path, {"a": torch.ones(1)}, {"steps": 4})
    assert checkpoint.read_recipe(path) == {"steps": 3}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_weights_may_be_read_by_whom_other_new_files_may(tmp_path):
    path, other = tmp_path / "weights.safetensors", tmp_path / "other"
    other.touch()
    left = tmp_path / "weights.safetensors.part"
    left.touch(0o600)
    checkpoint.save_weights(path, {"a": torch.ones(1)}, {})
    assert path.stat().st_mode == other.stat().st_mode and not left.exists()


def test_a_full_disk_is_an_os_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoint.save_weights(path, {"a": torch.ones(1)}, {"steps": 3})
    with small_disk(20_000), pytest.raises(OSError, match="weights|large|space|writ"):
        checkpoint.save_weights(path, {"a": torch.ones(100, 100)}, {"steps": 4}, torch.float32)
    assert checkpoint.read_recipe(path) == {"steps": 3}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_no_recipe_where_there_is_no_file(tmp_path):
    assert checkpoint.read_recipe(tmp_path / "none.safetensors") is None
