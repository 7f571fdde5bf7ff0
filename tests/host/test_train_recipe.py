"""What a recipe says is what a training inside a node does, and what its file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, inflate
from helpers_train import FRAMES, WIDGETS, Pictures, Recorder, Text, small_module
from latentmotion.host import options, train, train_stages, tune
from latentmotion.host.motion import MotionModule, load_motion_module
from latentmotion.motion_modules.animatediff.lora import read_motion_lora
from latentmotion.motion_modules.errors import LatentMotionError
from latentmotion.training.checkpoint import read_recipe
from latentmotion.training.clips import Clips
from latentmotion.training.loop import Recipe
from test_train_lora import KEY, clip_of_a_moving_edge
from test_train_stages import ADAPTER, MODULE
from test_tune import WIDGETS as TUNING
from torch import Tensor

pytest_plugins = ["helpers_train_fixtures"]


def learn(model: ModelPatcher, module: MotionModule, monkeypatch: Any, at: Any = None, recipe: dict | None = None,
          **widgets: Any) -> tuple[train.LoraTraining, list[float]]:  # fmt: skip
    """Train a MotionLoRA with some fields of its recipe changed: the training and its losses."""
    recorder, how = Recorder(at), options.lora_training(**WIDGETS | widgets)
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    how = replace(how, recipe=replace(how.recipe, **recipe or {}))
    train.train_motion_lora(model, module, Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how)
    return how, recorder.losses


def losses_of(model: ModelPatcher, **recipe: Any) -> tuple[list[float], list[float]]:
    """Losses of six batches of a network that is off by 0.1 + sigma, and the noise levels it was asked at."""
    noise, seen = torch.ones(2, 4, 4, 4), []
    clips = Clips((noise,), ("a",), 2, drop=0.0)

    def apply_model(x: Tensor, sigma: Tensor, **told: Any) -> Tensor:
        seen.append(float(sigma[0]))
        return noise + (0.1 + sigma.view(-1, 1, 1, 1)) * sigma.view(-1, 1, 1, 1)

    base = SimpleNamespace(model_sampling=model.model.model_sampling, diffusion_model=torch.nn.Linear(1, 1),
                           apply_model=apply_model)  # fmt: skip
    loss_of = train.noise_loss(base, clips, lambda captions: {}, {}, Recipe("r", 1, 1, 0.1, **recipe))
    return [float(loss_of(i, torch.Generator().manual_seed(i))) for i in range(6)], seen


def test_the_loss_is_the_recipes(model: ModelPatcher) -> None:
    (square, seen), (huber, again) = losses_of(model), losses_of(model, loss="huber")
    assert seen == again
    assert square == pytest.approx([(0.1 + sigma) ** 2 for sigma in seen], rel=1e-3)
    assert huber == pytest.approx([2 * ((1 + (0.1 + sigma) ** 2) ** 0.5 - 1) for sigma in seen], rel=1e-3)


def test_levels_are_the_recipes(model: ModelPatcher) -> None:
    sigmas = model.model.model_sampling.sigmas
    _, low = losses_of(model, levels=((0.0, 0.2),))
    _, high = losses_of(model, levels=((0.9, 1.0),))
    assert max(low) <= float(sigmas[200]) < float(sigmas[899]) <= min(high)


def test_the_file_tells_the_whole_recipe(model: ModelPatcher, folder: Path, monkeypatch: Any) -> None:
    how, _ = learn(model, small_module(), monkeypatch, steps=1, recipe={"levels": ((0.2, 1.0),), "loss": "huber"})
    told = read_recipe(how.path)
    assert told.keys() == Recipe("r", 1, 1, 0.1).told().keys()
    assert {name: told[name] for name in ("loss", "levels", "optimiser", "precision", "recompute", "trains")} == {
        "loss": "huber", "levels": [[0.2, 1.0]], "optimiser": "AdamW", "precision": "float32", "recompute": True,
        "trains": [".to_"]}  # fmt: skip
    with pytest.raises(LatentMotionError, match="was made with other settings"):
        learn(model, small_module(), monkeypatch, steps=1, recipe={"loss": "huber"})


def interrupt(step: int) -> None:
    if step == 2:
        comfy.model_management.interrupt_current_processing()


def test_checkpointing_may_change_within_a_run_and_nothing_else(model: ModelPatcher, folder: Path,
                                                                monkeypatch: Any) -> None:
    module = small_module()
    _, whole = learn(model, module, monkeypatch, file_name="whole")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        learn(model, module, monkeypatch, interrupt, gradient_checkpointing=False)
    with pytest.raises(LatentMotionError, match=r"noise_levels all alike \(now 0.5 to 1\), loss mse \(now huber\)"):
        learn(model, module, monkeypatch, recipe={"loss": "huber", "levels": ((0.5, 1.0),)})
    _, resumed = learn(model, module, monkeypatch, gradient_checkpointing=True)
    assert resumed == whole


def test_a_precision_the_model_does_not_compute_in_is_refused(model: ModelPatcher, folder: Path,
                                                              monkeypatch: Any) -> None:
    with pytest.raises(LatentMotionError, match="asks for bfloat16, and this MODEL computes in float32"):
        learn(model, small_module(), monkeypatch, recipe={"precision": "bfloat16"})
    assert not list(folder.glob("*.safetensors"))


def test_float16_scales_its_loss() -> None:
    scales = {kind: train.loss_scale(Recipe("r", 1, 1, 0.1, precision=kind)) for kind in ("float32", "bfloat16")}
    assert set(scales.values()) == {1.0} and train.loss_scale(Recipe("r", 1, 1, 0.1, precision="float16")) > 1000


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_inside_the_host(precision: str, folder: Path, monkeypatch: Any) -> None:
    model, module = tiny_host.sd15(**SMALL, dtype=getattr(torch, precision)), small_module()
    weights, moving = tiny_host.weights(model), tiny_host.weights(module.patcher)
    drawn = tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4)
    how, losses = learn(model, module, monkeypatch, steps=30, batch_size=4, recipe={"precision": precision})
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    tensors = train.read_weights(how.path)
    assert all(KEY.fullmatch(key) for key in tensors) and len(tensors) == 16 * len(module.spec.slots)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values()), "what learns is float32"
    assert read_recipe(how.path)["precision"] == precision
    read_motion_lora(tensors, "learned")
    assert torch.equal(tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4), drawn)
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)
    tiny_host.assert_same_weights(module.patcher, moving)


@pytest.mark.parametrize("optimiser", ["AdamW", "Muon"])
def test_a_module_learns_in_bfloat16(optimiser: str, folder: Path, monkeypatch: Any) -> None:
    model = tiny_host.sd15(**SMALL, dtype=torch.bfloat16)
    weights, recorder = tiny_host.weights(model), Recorder()
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    how = options.module_training(**MODULE | {"steps": 16, "batch_size": 4, "optimiser": optimiser})
    parts = (Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how)
    train_stages.train_motion_module(model, *parts)
    assert sum(recorder.losses[-5:]) < 0.97 * sum(recorder.losses[:5])
    assert load_motion_module("learned.safetensors").spec.levels == (32, 64)
    assert read_recipe(how.path)["optimiser"] == optimiser
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)


def test_only_what_an_adapter_trains_is_in_its_file(model: ModelPatcher, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(train, "TrainingProgress", Recorder())
    how = options.adapter_training(**ADAPTER | {"steps": 1})
    how = replace(how, recipe=replace(how.recipe, trains=("attn2.to_k",)))
    train_stages.train_domain_adapter(model, Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how)
    keys = train.read_weights(how.path)
    assert keys and all(".attn2.processor.to_k_lora." in key for key in keys)


def test_only_what_a_module_trains_changes(model: ModelPatcher, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(train, "TrainingProgress", Recorder())
    start, how = small_module(), options.module_training(**MODULE | {"steps": 2})
    how = replace(how, recipe=replace(how.recipe, trains=("proj_out", "up_blocks")))
    parts = (Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how, start)
    made = train_stages.train_motion_module(model, *parts).patcher.model.state_dict()
    before = {name: tensor.half().float() for name, tensor in tiny_host.weights(start.patcher).items()}
    changed = {name for name, tensor in made.items() if not torch.equal(tensor.half().float(), before[name])}
    assert changed and all("proj_out" in name or "up_blocks" in name for name in changed)
    assert any("proj_out" in name and "down_blocks" in name for name in changed)


def test_only_what_a_tuning_trains_changes(model: ModelPatcher, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(train, "TrainingProgress", Recorder())
    how = options.tuning(**TUNING | {"steps": 2})
    assert how.recipe.trains == ("attn1.to_q", "attn2.to_q", "attn_temp")
    how = replace(how, recipe=replace(how.recipe, trains=("attn1.to_q",)))
    tune.tune_video_model(model, Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how)
    tensors = train.read_weights(how.path)
    moved = {name for name, tensor in tensors.items() if name.endswith(".diff") and tensor.any()}
    still = {name for name, tensor in tensors.items() if name.endswith(".diff") and not tensor.any()}
    assert moved and all("attn1.to_q" in name for name in moved) and all("attn2.to_q" in name for name in still)
