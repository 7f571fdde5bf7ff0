"""The first stages of AnimateDiff as nodes: a domain adapter on frames, a motion module on clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import tiny_host
import torch
from helpers_motion import inflate
from helpers_train import FRAMES, Pictures, Recorder, Text, small_module, traces
from latentmotion.host import options, train, train_stages
from latentmotion.host.motion import check_teachable, load_motion_module
from latentmotion.motion_modules.animatediff.checkpoint import ADAPTER_KEY
from latentmotion.motion_modules.animatediff.spec import CONVOLUTION, V2, V3
from latentmotion.motion_modules.errors import LatentMotionError
from torch import Tensor

pytest_plugins = ["helpers_train_fixtures"]

SIZE = 32
RUN = {"file_name": "learned", "steps": 4, "learning_rate": 0.01, "batch_size": 2, "accumulate": 1, "seed": 3,
       "gradient_checkpointing": True, "save_every": 100, "existing": "go on", "sample_every": 0}  # fmt: skip
ADAPTER = RUN | {"rank": 4}
MODULE = RUN | {"layout": "AnimateDiff v3", "frames": FRAMES, "stride": 1, "clip_length": 0}


def edges() -> Tensor:
    columns = torch.arange(SIZE).view(1, 1, SIZE, 1)
    edge = torch.arange(FRAMES).view(FRAMES, 1, 1, 1) * 8
    return (columns < edge).float().expand(FRAMES, SIZE, SIZE, 3)


def adapt(model: Any, monkeypatch: Any, captions: str = "an edge", **widgets: Any) -> tuple:
    recorder, how = Recorder(), options.adapter_training(**ADAPTER | widgets)
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    return train_stages.train_domain_adapter(model, Text(), Pictures(), edges(), captions, how), recorder.losses


def move(model: Any, monkeypatch: Any, module: Any = None, at: Any = None, **widgets: Any) -> tuple:
    recorder, how = Recorder(at), options.module_training(**MODULE | widgets)
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    parts = (Text(), Pictures(), edges(), "an edge", how, module)
    return train_stages.train_motion_module(model, *parts), recorder.losses


def test_an_adapter_is_a_lora_of_the_published_layout(model, folder: Path, monkeypatch) -> None:
    before, weights, networks = tiny_host.sample(model, 1), tiny_host.weights(model), model.model.diffusion_model
    traced = traces(networks)
    adapted, losses = adapt(model, monkeypatch, steps=30, batch_size=8)
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert [entry[1:] for entry in traces(networks)] == [entry[1:] for entry in traced]
    tensors = train.read_weights(folder / "learned.safetensors")
    blocks = sum(name.endswith(".attn1") for name, _ in networks.named_modules())
    assert len(tensors) == 16 * blocks and all(ADAPTER_KEY.match(key) for key in tensors)
    learned = tiny_host.sample(adapted, 1)
    assert not torch.allclose(learned, before, atol=1e-3)
    loaded = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]
    assert torch.equal(tiny_host.sample(loaded, 1), learned)
    assert torch.equal(tiny_host.sample(model, 1), before), "the MODEL that came in is what it was"
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)


def test_pictures_may_have_a_caption_each(model, folder, monkeypatch) -> None:
    adapt(model, monkeypatch, captions="one\ntwo\nthree\nfour", steps=1, sample_every=1)
    with pytest.raises(LatentMotionError, match="There are 4 clips and 2 captions"):
        adapt(model, monkeypatch, captions="one\ntwo", steps=1)


@pytest.mark.parametrize(("layout", "variant"), [("AnimateDiff v3", V3), ("AnimateDiff v2 (middle block too)", V2)])
def test_a_new_module_begins_with_no_motion(model, folder, monkeypatch, layout: str, variant: Any) -> None:
    before = tiny_host.sample(model, FRAMES, steps=1, size=4)
    still, _ = move(model, monkeypatch, layout=layout, learning_rate=0.0, steps=1)
    assert still.spec.variant is variant and still.spec.has_mid is (variant is V2)
    assert torch.equal(tiny_host.sample(inflate(model, still), FRAMES, steps=1, size=4), before)


def test_a_new_module_learns_and_is_in_the_file(model, folder: Path, monkeypatch) -> None:
    before, weights = tiny_host.sample(model, FRAMES, steps=1, size=4), tiny_host.weights(model)
    module, losses = move(model, monkeypatch, steps=16, batch_size=4)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    moved = tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4)
    assert not torch.allclose(moved, before, atol=1e-3)
    read = load_motion_module("learned.safetensors")
    assert torch.equal(tiny_host.sample(inflate(model, read), FRAMES, steps=1, size=4), moved)
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)


def test_a_module_without_attention_learns_and_takes_no_motion_lora(model, folder: Path, monkeypatch) -> None:
    still = tiny_host.sample(model, FRAMES, steps=1, size=4)
    module, losses = move(model, monkeypatch, steps=16, batch_size=4, layout="temporal convolution (ablation)")
    assert module.spec.variant is CONVOLUTION and sum(losses[-5:]) < 0.97 * sum(losses[:5])
    moved = tiny_host.sample(inflate(model, load_motion_module("learned.safetensors")), FRAMES, steps=1, size=4)
    assert torch.equal(tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4), moved)
    assert not torch.allclose(moved, still, atol=1e-3)
    with pytest.raises(LatentMotionError, match="no attention"):
        check_teachable(module)


def test_a_module_one_has_is_taken_further(model, folder: Path, monkeypatch) -> None:
    module = small_module()
    weights = tiny_host.weights(module.patcher)
    same, _ = move(model, monkeypatch, module, learning_rate=0.0, steps=1, file_name="same")
    copied = same.patcher.model.state_dict()
    assert all(torch.equal(copied[key].half(), tensor.half()) for key, tensor in weights.items())
    further, _ = move(model, monkeypatch, module, file_name="further")
    changed = further.patcher.model.state_dict()
    assert all(not torch.equal(changed[key], copied[key]) for key in copied if key.endswith(".weight"))
    tiny_host.assert_same_weights(module.patcher, weights)


def test_cancel_keeps_the_state_of_a_module(model, folder: Path, monkeypatch) -> None:
    _, whole = move(model, monkeypatch, file_name="whole")

    def cancel(step: int) -> None:
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        move(model, monkeypatch, at=cancel)
    _, resumed = move(model, monkeypatch)
    assert resumed == whole
    left, right = (train.read_weights(folder / f"{name}.safetensors") for name in ("whole", "learned"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_adapter_is_in_place_while_the_module_learns(model, folder, monkeypatch) -> None:
    adapted, _ = adapt(model, monkeypatch, file_name="adapter", steps=8)
    first = [move(one, monkeypatch, steps=1, file_name=name)[1][0] for one, name in ((model, "a"), (adapted, "b"))]
    assert first[0] != first[1]


@pytest.mark.parametrize(("widgets", "sentence"), [
    ({"frames": 33}, "The new motion module knows 32 frame positions"),
    ({"layout": "v9"}, "layout is 'v9', which is not one of its choices"),
    ({"frames": 5}, "has 4 frames, and 5 frames need 5"),
])  # fmt: skip
def test_settings_that_cannot_work_are_said(model, folder, monkeypatch, widgets: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        move(model, monkeypatch, **widgets)
