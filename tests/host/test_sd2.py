"""SD2.x: velocity prediction, captions of 1024 channels, heads of 64 channels, linear layers round its transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import pytest
import tiny_host
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, inflate, motion_module, relative_error
from helpers_train import WIDGETS, Pictures, Recorder, Text
from latentmotion.bench.tav import STEP, predicted_noise, tuned_file
from latentmotion.bench.tav_reference import TunedUNet
from latentmotion.host import material, options, train, train_stages, tune
from latentmotion.host.tuned import apply_tuned
from latentmotion.motion_modules.files import read_metadata, read_weights
from latentmotion.motion_modules.tune_a_video.checkpoint import read_tuned
from latentmotion.training.clips import Clips, stratified
from latentmotion.training.loop import Recipe
from test_frame_attention import FRAMES, call, clip, seen_by
from test_frame_attention import WIDGETS as ATTENTION
from test_train_lora import KEY, clip_of_a_moving_edge
from test_train_stages import ADAPTER, MODULE
from test_tune import WIDGETS as TUNING
from torch import Tensor

pytest_plugins = ["helpers_train_fixtures"]

WIDTHS, CAPTION = (64, 128), 1024
SIGN_OF_VELOCITY = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([1.0, -1.0])}


@pytest.fixture
def model() -> ModelPatcher:
    """The host's own SD2.x class, which takes a network of SD2.1 for one that predicts velocity by this tensor."""
    unet = tiny_host.sd15_config(WIDTHS[0], CAPTION, use_linear_in_transformer=True, **SMALL)
    config = comfy.supported_models.SD20(unet)
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        base = config.get_model(SIGN_OF_VELOCITY, "", device=None)
        tiny_host.randomize(base.diffusion_model)
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(base, load_device=device, offload_device=comfy.model_management.unet_offload_device())


def small_module() -> Any:
    return motion_module(widths=WIDTHS, layers=1)


def parts() -> tuple:
    return Text(CAPTION), Pictures(), clip_of_a_moving_edge(), "an edge"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(train, "TrainingProgress", made)
    return made


def test_the_model_is_what_it_stands_for(model: ModelPatcher) -> None:
    assert isinstance(model.model.model_sampling, comfy.model_sampling.V_PREDICTION)
    layers = [m for m in model.model.diffusion_model.modules() if isinstance(m, SpatialTransformer)]
    assert {(m.in_channels, m.transformer_blocks[0].n_heads) for m in layers} == {(64, 1), (128, 2)}
    assert all(isinstance(m.proj_in, torch.nn.Linear) for m in layers)


@pytest.mark.parametrize("mode", ["first and previous", "full"])
def test_st_attention(mode: str, model: ModelPatcher, run_node: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against self-attention written out with one softmax per frame, in every transformer block."""
    worst, real = [], BasicTransformerBlock.forward

    def watched(self: Any, x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:
        normed = self.norm1(x)
        expected = torch.cat([self.attn1(normed[i : i + 1], context=normed[seen_by(mode, i)].flatten(0, 1)[None])
                              for i in range(FRAMES)])  # fmt: skip
        found: list[Tensor] = []
        hook = self.attn1.to_out.register_forward_hook(lambda _, args, out: found.append(out))
        out = real(self, x, context=context, transformer_options=transformer_options)
        hook.remove()
        worst.append(relative_error(found[0], expected))
        return out

    (video,) = run_node("LatentMotionSTAttention", model=model, **ATTENTION | {"keys_from": mode})
    with monkeypatch.context() as patch:
        patch.setattr(BasicTransformerBlock, "forward", watched)
        found = call(video, clip())
    assert len(worst) == 7 and max(worst) < 1e-5
    assert relative_error(found, call(model, clip())) > 1e-3


def test_motion_loras_are_trained_on_the_velocity(model: ModelPatcher, folder: Path, recorder: Recorder) -> None:
    module, before = small_module(), tiny_host.weights(model)
    drawn = tiny_host.sample(inflate(model, module), FRAMES, steps=1, size=4)
    how = options.lora_training(**WIDGETS | {"steps": 24, "batch_size": 4})
    made = train.train_motion_lora(model, module, *parts(), how)
    assert sum(recorder.losses[-6:]) < 0.9 * sum(recorder.losses[:6])
    assert all(KEY.fullmatch(key) for key in read_weights(how.path))
    moved = tiny_host.sample(inflate(model, made), FRAMES, steps=1, size=4)
    assert moved.isfinite().all() and not torch.allclose(moved, drawn, atol=1e-3)
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, before)


def test_the_loss_is_the_error_in_the_velocity(model: ModelPatcher) -> None:
    """Of the whole model, not of a stand-in: out of its network comes v, which is alpha noise - sigma picture."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad():
        comfy.model_management.load_models_gpu([model])
        model.pre_run()
        clips = Clips((latents,), ("a",), 2, drop=0.0)
        conditions = train.Conditions(model, material.encode_texts(Text(CAPTION), ["a"]), clips)
        recipe = Recipe("velocity", steps=1, batch=1, learning_rate=0.0)
        loss_of = train.noise_loss(model.model, clips, conditions, train.call_options(model), recipe)
        hook = model.model.diffusion_model.register_forward_hook(lambda _, args, out: seen.append(out))
        loss = float(loss_of(0, torch.Generator().manual_seed(3)))
        hook.remove()
    generator = torch.Generator().manual_seed(3)
    clips.draw(1, generator)
    sigma = model.model.model_sampling.sigmas[stratified(1, 1000, generator)]
    noise = torch.randn(latents.shape, generator=generator)
    target = (noise - sigma * latents) / (1 + sigma**2).sqrt()
    assert loss == pytest.approx(float((seen[0] - target).square().mean()), rel=1e-3)


class HeadsOf64(TunedUNet):
    """The independent float64 network with SD2.x's heads."""

    def attention(self, x: Tensor, seen: Tensor, name: str) -> Tensor:
        self.heads = x.shape[-1] // 64
        return super().attention(x, seen, name)


def test_a_tuned_network_is_the_authors(model: ModelPatcher) -> None:
    file, x = tuned_file(model), clip(3, seed=2)
    text = torch.randn(1, 7, CAPTION, generator=torch.Generator().manual_seed(3))
    sigma = model.get_model_object("model_sampling").sigmas[STEP].double()
    clean = x - sigma * predicted_noise(apply_tuned(model, file), x, text)
    spread = (1 + sigma**2).sqrt()
    velocity = (x.double() / spread**2 - clean) * spread / sigma
    network = HeadsOf64({**file.weights, **file.temporal}, 1)
    expected = network((x.double() / spread).transpose(0, 1)[None], STEP, text)[0].transpose(0, 1)
    assert float((velocity - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_first_stages(model: ModelPatcher, folder: Path, recorder: Recorder) -> None:
    how = options.adapter_training(**ADAPTER | {"steps": 2, "file_name": "adapter"})
    adapted = train_stages.train_domain_adapter(model, *parts(), how)
    loaded = comfy.sd.load_lora_for_models(model, None, read_weights(how.path), 1.0, 0.0)[0]
    assert torch.equal(tiny_host.sample(loaded, 1, steps=1, size=4), tiny_host.sample(adapted, 1, steps=1, size=4))
    how = options.module_training(**MODULE | {"steps": 16, "batch_size": 4, "file_name": "module"})
    module = train_stages.train_motion_module(adapted, *parts(), how)
    assert module.spec.levels == WIDTHS and sum(recorder.losses[-5:]) < sum(recorder.losses[:5])


def test_tune_a_video(model: ModelPatcher, folder: Path, recorder: Recorder) -> None:
    before, drawn = tiny_host.weights(model), tiny_host.sample(model, FRAMES, steps=1, size=4)
    how = options.tuning(**TUNING | {"steps": 24})
    tuned = tune.tune_video_model(model, *parts(), how)
    assert sum(recorder.losses[-6:]) < sum(recorder.losses[:6])
    file = read_tuned(read_weights(how.path), read_metadata(how.path), how.path.name)
    assert {channels for _, channels in file.slots} == set(WIDTHS)
    found = tiny_host.sample(tuned, FRAMES, steps=1, size=4)
    assert found.isfinite().all() and relative_error(found, drawn) > 1e-3
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, before)
