"""Training inside a node: what is learned is in the file, and the host's models are what they were."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import inflate
from helpers_train import FRAMES, WIDGETS, Pictures, Recorder, Text, small_module, traces
from latentmotion.host import options, train
from latentmotion.host.motion import MotionModule, add_motion_lora
from latentmotion.motion_modules.animatediff.spec import V1, V2
from latentmotion.motion_modules.errors import LatentMotionError, TrainingError
from latentmotion.training.clips import Clips
from latentmotion.training.loop import Recipe
from small_disk import small_disk
from torch import Tensor

pytest_plugins = ["helpers_train_fixtures"]

SIZE = 32
KEY = re.compile(
    r"(down_blocks\.\d|up_blocks\.\d|mid_block)\.motion_modules\.\d\.temporal_transformer\.transformer_blocks\.0\."
    r"attention_blocks\.[01]\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight"
)


def clip_of_a_moving_edge() -> Tensor:
    columns = torch.arange(SIZE).view(1, 1, SIZE, 1)
    edge = torch.arange(FRAMES).view(FRAMES, 1, 1, 1) * 8
    return (columns < edge).float().expand(FRAMES, SIZE, SIZE, 3)


def learn(model: ModelPatcher, module: MotionModule, monkeypatch: Any, at: Any = None,
          recorder: Recorder | None = None, **widgets: Any) -> tuple:  # fmt: skip
    """(motion module with the new LoRA, losses), as the node does it."""
    recorder, how = recorder or Recorder(at), options.lora_training(**WIDGETS | widgets)
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    try:
        made = train.train_motion_lora(model, module, Text(), Pictures(), clip_of_a_moving_edge(), "an edge", how)
    except BaseException as error:
        error.losses = recorder.losses
        raise
    return made, recorder.losses


def test_what_is_learned_is_in_the_file_and_nothing_else_changed(model, folder, monkeypatch):
    module = small_module()
    networks = (model.model.diffusion_model, module.patcher.model)
    before, weights, moving = traces(*networks), tiny_host.weights(model), tiny_host.weights(module.patcher)
    drawn = tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4)
    made, losses = learn(model, module, monkeypatch, steps=30, batch_size=4)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert [file.name for file in folder.iterdir()] == ["learned.safetensors"]
    tensors = tensors_of(folder / "learned.safetensors")
    assert all(KEY.fullmatch(key) for key in tensors) and len(tensors) == 16 * len(module.spec.slots)
    half, whole = (
        tiny_host.sample(inflate(model, add_motion_lora(module, "learned.safetensors", s)), FRAMES, steps=1, size=4)
        for s in (0.5, 1.0)
    )
    assert torch.equal(whole, tiny_host.sample(inflate(model, made), FRAMES, steps=1, size=4))
    assert 0 < (half - drawn).norm() < (whole - drawn).norm()
    assert torch.equal(tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4), drawn)
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)
    tiny_host.assert_same_weights(module.patcher, moving)
    assert [entry[1:] for entry in traces(*networks)] == [entry[1:] for entry in before]


def tensors_of(path: Path) -> dict[str, Tensor]:
    return train.read_weights(path)


def test_only_the_named_layers_learn(model, folder, monkeypatch):
    module = small_module()
    learn(model, module, monkeypatch, steps=2, layers="up_blocks, to_q")
    names = {layer for layer, _ in module.patcher.model.named_modules() if layer.endswith(("to_q", "to_k"))}
    wanted = {name for name in names if "up_blocks" in name or name.endswith("to_q")}
    keys = [key for key in tensors_of(folder / "learned.safetensors") if re.search(r"to_[qk]_lora", key)]
    assert len(keys) == 2 * len(wanted) < 2 * len(names)
    assert not [key for key in keys if "to_k" in key and "up_blocks" not in key]
    with pytest.raises(LatentMotionError, match="layers says to_x, and no layer is named so"):
        learn(model, module, monkeypatch, file_name="other", layers="to_x")


def test_cancel_keeps_the_state_and_the_next_run_goes_on(model, folder, monkeypatch):
    module = small_module()
    _, whole = learn(model, module, monkeypatch, file_name="whole")
    networks = (model.model.diffusion_model, module.patcher.model)
    before = traces(*networks)

    def cancel(step: int) -> None:
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException) as stopped:
        learn(model, module, monkeypatch, cancel)
    assert len(stopped.value.losses) in (2, 3)  # within the step after the click
    assert (folder / "learned.safetensors.training").is_file() and not (folder / "learned.safetensors").exists()
    assert traces(*networks) == before
    with pytest.raises(LatentMotionError, match=r"begun with other settings: .*steps 6 \(now 7\)"):
        learn(model, module, monkeypatch, steps=7)
    _, resumed = learn(model, module, monkeypatch)
    assert resumed == whole
    left, right = (tensors_of(folder / f"{name}.safetensors") for name in ("whole", "learned"))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_full_disk_costs_only_the_file(model, folder, monkeypatch):
    """The state fits, the file does not; with room again it is written without another step."""
    module, write = small_module(), train.write_file

    def full(*given: Any) -> None:
        with small_disk(1000):
            write(*given)

    def fail(step: int) -> None:
        raise RuntimeError("trained again")

    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="learned.safetensors could not be writ.*"
                                                                              "and only the file is missing"):
        patched.setattr(train, "write_file", full)
        learn(model, module, patched)
    assert [file.name for file in folder.iterdir()] == ["learned.safetensors.training"]
    learn(model, module, monkeypatch, fail)
    assert [file.name for file in folder.iterdir()] == ["learned.safetensors"]
    assert tensors_of(folder / "learned.safetensors")


def test_an_error_leaves_the_models_as_they_were(model, folder, monkeypatch):
    module = small_module()
    learn(model, module, monkeypatch, steps=1, file_name="warm")
    networks = (model.model.diffusion_model, module.patcher.model)
    before = traces(*networks)

    def fail(step: int) -> None:
        raise RuntimeError("the card fell out")

    with pytest.raises(RuntimeError, match="fell out"):
        learn(model, module, monkeypatch, fail)
    assert traces(*networks) == before
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


@pytest.mark.parametrize("variant", [V1, V2], ids=lambda variant: variant.name)
def test_recomputing_layers_changes_no_loss(model, folder, monkeypatch, variant):
    module = small_module(variant=variant)
    runs = [
        learn(model, module, monkeypatch, gradient_checkpointing=twice, file_name=f"r{twice}", steps=3)[1]
        for twice in (False, True)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_a_finished_file_is_kept_and_not_trained_again(model, folder, monkeypatch):
    module = small_module()
    learn(model, module, monkeypatch, steps=2)
    _, again = learn(model, module, monkeypatch, steps=2)
    assert again == []
    with pytest.raises(LatentMotionError, match="is there already"):
        learn(model, module, monkeypatch, steps=3)
    _, anew = learn(model, module, monkeypatch, steps=3, existing="start over")
    assert len(anew) == 3


@pytest.mark.parametrize(("widgets", "sentence"), [
    ({"frames": 33}, "knows 32 frame positions"),
    ({"frames": 3, "stride": 2}, "need 5"),
    ({"clip_length": 3}, "no whole number of clips"),
    ({"file_name": "../outside"}, "is no name for a file"),
    ({"existing": "maybe"}, "not one of its choices"),
])  # fmt: skip
def test_settings_that_cannot_work_are_said(model, folder, monkeypatch, widgets, sentence):
    with pytest.raises(ValueError, match=sentence):
        learn(model, small_module(), monkeypatch, **widgets)


def test_a_module_that_moves_nothing_is_not_trained_on(model, folder, monkeypatch, caplog):
    still, moving = small_module(still=True), small_module()
    with pytest.raises(LatentMotionError, match="tiny-0 moves nothing"):
        learn(model, still, monkeypatch)
    learn(model, moving, monkeypatch, steps=1)
    caplog.clear()
    add_motion_lora(moving, "learned.safetensors", 1.0)
    assert not caplog.messages
    add_motion_lora(still, "learned.safetensors", 1.0)
    assert "learned.safetensors has no effect on tiny-0" in caplog.messages[0]


@pytest.mark.parametrize("ceiling", [1.0, 5.0, 1e9])
def test_noisy_levels_count_more_where_they_are_asked_to(model, ceiling: float):
    sampling, noise = model.model.model_sampling, torch.ones(2, 4, 4, 4)
    clips, seen = Clips((noise,), ("a",), 2, drop=0.0), []

    def apply_model(x: Tensor, sigma: Tensor, **told: Any) -> Tensor:
        seen.append(sigma)
        return clips.latents[0] + 0.1 * sigma.view(-1, 1, 1, 1)

    base = SimpleNamespace(model_sampling=sampling, diffusion_model=torch.nn.Linear(1, 1), apply_model=apply_model)
    loss_of = train.noise_loss(base, clips, lambda captions: {}, {}, Recipe("r", 1, 1, 0.1, ceiling=ceiling))
    losses = [float(loss_of(i, torch.Generator().manual_seed(i))) for i in range(6)]
    weights = [min(1 + float(sigma[0]) ** 2, ceiling) for sigma in seen]
    assert losses == pytest.approx([0.01 * weight for weight in weights], rel=1e-3)
    assert max(float(sigma[0]) for sigma in seen) > 3, "one of the levels is a noisy one"


def test_the_widgets_reach_the_recipe(folder):
    asked = options.lora_training(**WIDGETS, high_noise_weight=40.0, noise_levels="half from the noisiest").recipe
    assert asked.ceiling == 40.0 and asked.levels == ((0.0, 1.0), (0.85, 1.0))
    plain = options.lora_training(**WIDGETS).recipe
    assert plain.ceiling == 1.0 and plain.levels == ((0.0, 1.0),)
    with pytest.raises(ValueError, match="noise_levels is 'most', which is not one"):
        options.lora_training(**WIDGETS, noise_levels="most")


def test_clips_are_drawn_on_the_way_and_change_nothing(model, folder, monkeypatch):
    shown: list[Any] = []

    class Watcher(Recorder):
        def __call__(self, *args: Any) -> Any:
            shown.append(super().__call__(*args))
            return shown[-1]

    module = small_module()
    _, plain = learn(model, module, monkeypatch, file_name="plain")
    _, watched = learn(model, module, monkeypatch, recorder=Watcher(), file_name="watched", sample_every=3)
    assert watched == plain
    assert shown[0].strip.size == (480, 120)
    low, high = shown[0].strip.convert("L").getextrema()
    assert high > low
    left, right = (tensors_of(folder / f"{name}.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(left[key], right[key]) for key in left)
