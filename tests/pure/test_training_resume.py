"""However a training run ends, the next one goes on with the same numbers; the host's weights are lent, not copied."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_run
from latentmotion.motion_modules.errors import TrainingError
from latentmotion.training import frozen
from latentmotion.training.checkpoint import (
    load_state,
    load_weights,
    read_recipe,
    read_state_recipe,
    save_state,
    save_weights,
)
from latentmotion.training.loop import Recipe, fit
from torch import nn

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "scripts"
CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import pack
pack.load_pack()
import training_run
training_run.run(Path(sys.argv[1]), [], pause=0.02)
"""


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path):
    state = tmp_path / "state.pt"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(state), str(HERE), str(SCRIPTS)])
    try:
        ends = time.monotonic() + 120
        while not state.is_file() and child.poll() is None and time.monotonic() < ends:
            time.sleep(0.01)
    finally:
        child.kill()  # SIGKILL: nothing of the child's runs any more
        child.wait()
    assert state.is_file(), "the child wrote no state"
    kept = torch.load(state, weights_only=True)["step"]
    assert 0 < kept < training_run.RECIPE.steps
    whole, resumed = [], []
    expected = training_run.run(None, whole)
    found = training_run.run(state, resumed)
    assert len(whole) == training_run.RECIPE.steps
    assert resumed == whole  # of the steps before the kill too
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_any_error_keeps_the_state(tmp_path):
    layer, state, seen = nn.Linear(2, 1), tmp_path / "state.pt", []

    def loss_of(batch: int, generator: torch.Generator) -> torch.Tensor:
        return layer(torch.randn(4, 2, generator=generator)).square().mean()

    def on_step(step: int, total: int, loss: float) -> None:
        seen.append(step)
        if step == 3:
            raise KeyboardInterrupt

    recipe = Recipe("stops", steps=9, batch=4, learning_rate=0.01)
    with pytest.raises(KeyboardInterrupt):
        fit(dict(layer.named_parameters()), loss_of, recipe, state, on_step)
    fit(dict(layer.named_parameters()), loss_of, recipe, state, on_step)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_run_that_fails_in_its_first_step_leaves_nothing_behind(tmp_path):
    """So that it can be tried again with a smaller batch."""
    layer, state = nn.Linear(2, 1), tmp_path / "state.pt"

    def loss_of(batch: int, generator: torch.Generator) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(dict(layer.named_parameters()), loss_of, Recipe("large", steps=9, batch=4, learning_rate=0.01), state)
    assert not list(tmp_path.iterdir())


def test_accumulated_batches_are_one_large_batch():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)
        pieces = x.chunk(parts)

        def loss_of(batch: int, generator: torch.Generator, layer=layer, pieces=pieces) -> torch.Tensor:
            return layer(pieces[batch % len(pieces)]).square().mean()

        recipe = Recipe("line", steps=5, batch=8 // parts, learning_rate=0.05, warmup=1, accumulate=parts)
        found.append(fit(dict(layer.named_parameters()), loss_of, recipe))
    assert torch.allclose(found[0]["weight"], found[1]["weight"], atol=1e-6)


def test_steps_that_overflow_are_left_out_and_endless_ones_reported():
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    recipe = Recipe("overflow", steps=30, batch=1, learning_rate=0.01, warmup=1, weight_decay=0.0)
    factor = {1: float("inf")}
    fit(dict(layer.named_parameters()), lambda n, _: layer.weight.sum() * factor.get(n, 1.0), recipe, loss_scale=256.0)
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before)
    with pytest.raises(TrainingError, match="not a number any more since step 4, .* Lower learning_rate"):
        bad = lambda n, _: layer.weight.sum() * (1.0 if n < 3 else float("nan"))  # noqa: E731
        fit(dict(layer.named_parameters()), bad, recipe)


def test_one_bad_clip_of_five_does_not_end_a_run():
    """However often it comes, and the scale of float16 comes back meanwhile."""
    layer, seen = nn.Linear(2, 1, bias=False), []
    recipe = Recipe("overflow", steps=1400, batch=1, learning_rate=0.01, warmup=1, weight_decay=0.0)

    def loss_of(number: int, generator: torch.Generator) -> torch.Tensor:
        loss = layer.weight.square().sum() * (float("nan") if number % 5 == 0 and number < 300 else 1.0)
        loss.register_hook(lambda scale: seen.append(float(scale)))
        return loss

    fit(dict(layer.named_parameters()), loss_of, recipe, loss_scale=256.0)
    assert layer.weight.isfinite().all() and layer.weight.abs().max() < 0.01
    assert min(seen) == 1.0 and max(seen[800:]) == 4.0


def test_the_loss_scale_changes_no_update():
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)
        recipe = Recipe("line", steps=5, batch=4, learning_rate=0.05, warmup=1)
        batch = torch.ones(4, 3)
        parameters = dict(layer.named_parameters())
        fit(parameters, lambda *_, layer=layer, batch=batch: layer(batch).square().mean(), recipe, loss_scale=scale)
        found.append(layer.weight.detach())
    assert torch.equal(*found)  # a power of two rounds nothing


def test_a_full_disk_is_said_and_the_older_state_stays(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, {"recipe": {"steps": 1}, "step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="Make room on that disk"):
        save_state(path, {"recipe": {"steps": 1}, "step": 2})
    assert load_state(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_damaged_files_are_named(tmp_path, kept):
    """An empty one, and those that were cut short: what to do is said, too."""
    state, file = tmp_path / "a.training", tmp_path / "a.safetensors"
    save_state(state, {"recipe": {"steps": 1}, "weights": torch.ones(1000)})
    save_weights(file, {"a": torch.ones(1000)}, {"steps": 1})
    assert read_state_recipe(state) == read_recipe(file) == {"steps": 1}
    for path, read in ((state, read_state_recipe), (state, load_state), (file, read_recipe), (file, load_weights)):
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        with pytest.raises(TrainingError, match=rf"{path.name} cannot be read \(.*cut short or damaged. Delete it"):
            read(path)


def test_a_file_that_is_no_state_is_named(tmp_path):
    for other in ([1, 2], {"weights": torch.ones(2)}, {"recipe": 3}):
        torch.save(other, tmp_path / "a.training")
        for read in (read_state_recipe, load_state):
            with pytest.raises(TrainingError, match="a.training cannot be read"):
                read(tmp_path / "a.training")


@pytest.fixture
def host_network() -> nn.Module:
    """A network as the host makes it: in inference mode, asking for gradients."""
    torch.manual_seed(0)
    with torch.inference_mode():
        network = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        network.register_buffer("table", torch.ones(4))
    return network


def test_gradients_pass_through_weights_made_in_inference_mode(host_network):
    first = host_network[0].weight
    state = {name: (tensor, tensor.clone()) for name, tensor in host_network.state_dict(keep_vars=True).items()}
    with torch.inference_mode(), frozen.training(), frozen.frozen(host_network):
        inside = host_network[0].weight
        assert inside.data_ptr() == first.data_ptr(), "the weights were copied"
        x = torch.ones(2, 4, requires_grad=True)
        (host_network(x) * host_network.table).sum().backward()
        assert x.grad.abs().sum() > 0 and inside.grad is None
    for name, tensor in host_network.state_dict(keep_vars=True).items():
        assert tensor is state[name][0] and torch.equal(tensor, state[name][1])
    assert first.requires_grad and first.is_inference()


def test_weights_are_put_back_after_an_error(host_network):
    before = dict(host_network.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), frozen.training(), frozen.frozen(host_network):
        raise RuntimeError("stop")
    assert all(tensor is before[name] for name, tensor in host_network.named_parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_recomputed_layers_give_the_same_gradients_and_keep_less():
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)])
    x = torch.randn(5, 16)
    found, kept = [], []
    for layers in ([], list(network)):
        network.zero_grad()
        elements = []

        def pack(tensor: torch.Tensor, elements=elements) -> torch.Tensor:
            elements.append(tensor.numel())
            return tensor

        with frozen.recomputed(layers):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = network(x).square().sum()
            loss.backward()
        found.append(network[0][0].weight.grad.clone())
        kept.append(sum(elements))
    assert torch.equal(*found)
    assert kept[1] < kept[0] / 2
    assert not any("forward" in vars(module) for module in network.modules())
