"""Steps of a training that see some of a clip's frames: which ones, where in time, and what for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_train import FRAMES, WIDGETS, Pictures, Recorder, Text, small_module, traces
from latentmotion.host import options, train, train_loss
from latentmotion.host.inflate import Motion, MotionSettings
from latentmotion.host.train import motion_call, video_unet
from latentmotion.host.unet import CALLS, host_affine, place_frames
from latentmotion.motion_modules.animatediff.spec import V1, V2
from latentmotion.motion_modules.errors import TrainingError
from latentmotion.training.clips import Clips
from latentmotion.training.loop import Recipe
from torch import Tensor

pytest_plugins = ["helpers_train_fixtures"]


def learn(model: ModelPatcher, module: Any, monkeypatch: Any, **widgets: Any) -> tuple[dict[str, Tensor], list[float]]:
    """(tensors of the file, losses)."""
    recorder, how = Recorder(), options.lora_training(**WIDGETS | widgets)
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    film = torch.rand(FRAMES, 32, 32, 3, generator=torch.Generator().manual_seed(5))
    train.train_motion_lora(model, module, Text(), Pictures(), film, "noise", how)
    return train.read_weights(how.path), recorder.losses


def test_all_frames_by_number_learn_the_same_as_all_of_them(model, folder, monkeypatch):
    module = small_module()
    left, losses = learn(model, module, monkeypatch, file_name="all", frames_seen=0)
    right, again = learn(model, module, monkeypatch, file_name="four", frames_seen=FRAMES)
    assert losses == again and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("variant", [V1, V2])
@pytest.mark.parametrize("sample_every", [0, 2])
def test_some_frames_learn_something_else_and_leave_the_models_as_they_were(
    model, folder, monkeypatch, variant: Any, sample_every: int
):
    module = small_module(variant=variant)
    networks = (model.model.diffusion_model, module.patcher.model)
    before, weights = traces(*networks), tiny_host.weights(model)
    some, _ = learn(model, module, monkeypatch, file_name="some", frames_seen=2, sample_every=sample_every)
    every, _ = learn(model, module, monkeypatch, file_name="every", sample_every=sample_every)
    assert not all(torch.equal(some[key], every[key]) for key in some)
    assert all(bool(tensor.isfinite().all()) for tensor in some.values())
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)
    assert [entry[1:] for entry in traces(*networks)] == [entry[1:] for entry in before]


def test_every_step_sees_other_frames_each_at_its_place_in_time(model, monkeypatch):
    places, shown, far = [], [], 1e6
    clip = far * torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 2, 2)
    clips = Clips((clip,), ("a",), 6, drop=0.0)

    def apply_model(x: Tensor, sigma: Tensor, **told: Any) -> Tensor:
        shown.append((x.mean((1, 2, 3)) / far).round().long().view(2, 3).tolist())
        return x

    monkeypatch.setattr(train_loss, "place_frames", lambda unet, options, at: places.append(at.tolist()))
    base = SimpleNamespace(model_sampling=model.model.model_sampling, diffusion_model=torch.nn.Linear(1, 1),
                           apply_model=apply_model)  # fmt: skip
    loss_of = train.noise_loss(base, clips, lambda captions: {}, {}, Recipe("r", 1, 2, 0.1, frames_seen=3))
    for number in range(40):
        loss_of(number, torch.Generator().manual_seed(number))
    assert shown == [[at, at] for at in places]
    assert all(at == sorted(set(at)) and len(at) == 3 for at in places)
    assert {frame for at in places for frame in at} == set(range(6)) and len({tuple(at) for at in places}) > 10


@pytest.mark.parametrize("variant", [V1, V2])
def test_placed_frames_are_computed_as_a_clip_of_them(model, variant: Any):
    module, unet, width = small_module(variant=variant), model.model.diffusion_model, 32
    motion, at = Motion(module, MotionSettings()), torch.tensor([1.0, 5.0, 6.0])
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 7, width)

    def output(frames: int, positions: Tensor) -> Tensor:
        call = motion_call(model, frames, host_affine)
        with video_unet(model, motion.slots(unet, call), motion.joint, call, False) as told:
            place_frames(unet, told, positions)
            assert told[CALLS][0].frames == len(positions)
            return unet(x, torch.full((3,), 500.0), text, transformer_options=told)

    with torch.no_grad():
        placed, own = output(8, at), output(3, at)
        elsewhere = output(3, torch.arange(3.0))
    assert torch.equal(placed, own)
    assert not torch.allclose(placed, elsewhere)


def test_more_frames_than_a_clip_has_are_refused_in_words(model, folder, monkeypatch):
    with pytest.raises(TrainingError, match=r"frames_seen is 9, and a clip has 4 frames\. Set it to at most 4"):
        learn(model, small_module(), monkeypatch, frames_seen=9)
    assert not list(Path(folder).iterdir())
