"""Tuning inside a node: what is learned is in the file and in the MODEL that comes out, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from helpers_motion import relative_error
from helpers_train import FRAMES, Pictures, Recorder, Text, traces
from latentmotion.bench.tav import predicted_noise
from latentmotion.host import options, train, tune
from latentmotion.host.attention import FrameAttention, FrameBlock, apply_frame_attention
from latentmotion.host.samples import Samples
from latentmotion.host.tuned import TemporalBlock, names_of, original_weight, slots_of
from latentmotion.media.clip import clip_of_images
from latentmotion.motion_modules.errors import LatentMotionError
from latentmotion.motion_modules.files import read_metadata, read_weights
from latentmotion.motion_modules.tune_a_video.attention import Reach
from latentmotion.motion_modules.tune_a_video.checkpoint import read_tuned
from latentmotion.motion_modules.tune_a_video.network import trained_shapes
from latentmotion.training.clips import Clips, stratified
from latentmotion.training.loop import Recipe
from test_train_lora import clip_of_a_moving_edge
from torch import Tensor, nn

pytest_plugins = ["helpers_train_fixtures"]
WIDGETS = {"file_name": "edge", "steps": 6, "learning_rate": 0.01, "frames": FRAMES, "stride": 1, "seed": 33,
           "gradient_checkpointing": True, "save_every": 100, "existing": "go on", "sample_every": 0}  # fmt: skip
ONE = Recipe("a clip at a time", steps=1, batch=1, learning_rate=0.0)


def learn(model: ModelPatcher, monkeypatch: Any, at: Any = None, prompt: str = "an edge", video: Any = None,
          reach: Reach = Reach.SPARSE, **widgets: Any) -> tuple[ModelPatcher, list[float]]:  # fmt: skip
    """(tuned MODEL, losses), as the node does it."""
    recorder, how = Recorder(at), options.tuning(**WIDGETS | {"base_name": "v1-5.safetensors"} | widgets)
    how = replace(how, reach=reach)
    monkeypatch.setattr(train, "TrainingProgress", recorder)
    video = clip_of_a_moving_edge() if video is None else video
    try:
        made = tune.tune_video_model(model, Text(), Pictures(), video, prompt, how)
    except BaseException as error:
        error.losses = recorder.losses
        raise
    return made, recorder.losses


def nothing_stands_in(model: ModelPatcher) -> bool:
    return not any(isinstance(module, (FrameBlock, TemporalBlock)) for module in model.model.modules())


def text(model: ModelPatcher) -> Tensor:
    return tiny_host.conditioning(model, 1, tokens=5)[0][0]


def test_what_is_learned_is_in_the_file_and_nothing_else_changed(model, folder, monkeypatch, run_node):
    comfy.model_management.load_models_gpu([model], force_full_load=True)  # which replaces weights
    before, weights = traces(model.model.diffusion_model), tiny_host.weights(model)
    made, losses = learn(model, monkeypatch, steps=40)
    assert traces(model.model.diffusion_model) == before and nothing_stands_in(model)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert [file.name for file in folder.iterdir()] == ["edge.safetensors"]
    payload = read_weights(folder / "edge.safetensors")
    expected = {name.replace("to_q.weight", "to_q.diff") if "attn_temp" not in name else name: tuple(shape)
                for name, shape in trained_shapes(slots_of(model)).items()}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in payload.items()} == expected
    assert {tensor.dtype for tensor in payload.values()} == {torch.float16}
    still = [name for name, tensor in payload.items() if not tensor.any()]
    assert not still, "every trained tensor has moved"
    file = read_tuned(payload, read_metadata(folder / "edge.safetensors"), "edge")
    assert file.base.name == "v1-5.safetensors"
    x = torch.randn(FRAMES, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    (loaded,) = run_node("LatentMotionLoadTunedVideoModel", model=model, tuned_model="edge.safetensors", strength=1.0,
                         frames=0)  # fmt: skip
    found = predicted_noise(made, x, text(model))
    assert torch.equal(found, predicted_noise(loaded, x, text(model)))
    untuned = apply_frame_attention(model, FrameAttention())
    assert relative_error(found, predicted_noise(untuned, x, text(model))) > 1e-2
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, weights)


@pytest.mark.parametrize("reach", [Reach.SPARSE, Reach.OWN])
def test_what_is_trained_is_what_is_sampled(reach, model, folder, monkeypatch):
    """The loss of the last step, once more from the tuned MODEL's own call with the same noise."""
    seen = {}
    real = tune.noise_loss

    def watched(base: Any, clips: Any, *args: Any) -> Callable:
        seen["clips"], inner = clips, real(base, clips, *args)
        return inner

    monkeypatch.setattr(tune, "noise_loss", watched)
    made, losses = learn(model, monkeypatch, steps=3, learning_rate=0.0, reach=reach)
    generator = torch.Generator().manual_seed(33 * 1_000_003 + 2)
    latents, _ = seen["clips"].draw(1, generator)
    level = stratified(1, 1000, generator)
    noise, sigma = torch.randn(latents.shape, generator=generator), made.model.model_sampling.sigmas[level]
    condition = Text().encode_from_tokens_scheduled("an edge")[0][0]
    comfy.model_management.load_models_gpu([made, *made.get_nested_additional_models()])
    made.pre_run()
    options = {**made.model_options["transformer_options"], "cond_or_uncond": [0], "wrappers": made.wrappers}
    clean = made.model.apply_model(latents + sigma * noise, sigma.expand(FRAMES), transformer_options=options,
                                   c_crossattn=condition.expand(FRAMES, -1, -1))  # fmt: skip
    again = ((clean - latents) / sigma).square().mean()
    assert float(again) == pytest.approx(losses[-1], rel=1e-3)  # the file is float16
    other = Reach.OWN if reach is Reach.SPARSE else Reach.SPARSE
    with pytest.raises(LatentMotionError, match="is there already"):
        learn(model, monkeypatch, steps=3, learning_rate=0.0, reach=other)


def test_cancel_keeps_the_state_and_the_next_run_goes_on(model, folder, monkeypatch):
    made, whole = learn(model, monkeypatch, file_name="whole")
    comfy.model_management.unload_all_models()
    before, weights = traces(model.model.diffusion_model), tiny_host.weights(model)

    def cancel(step: int) -> None:
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException) as stopped:
        learn(model, monkeypatch, cancel)
    assert len(stopped.value.losses) in (2, 3)
    assert (folder / "edge.safetensors.training").is_file() and not (folder / "edge.safetensors").exists()
    assert traces(model.model.diffusion_model) == before and nothing_stands_in(model)
    tiny_host.assert_same_weights(model, weights)
    with pytest.raises(LatentMotionError, match=r"begun with other settings: .*steps 6 \(now 7\)"):
        learn(model, monkeypatch, steps=7)
    with pytest.raises(LatentMotionError, match="begun with other settings: clip, prompt or model"):
        learn(model, monkeypatch, prompt="a wall")
    _, resumed = learn(model, monkeypatch)
    assert resumed == whole
    left, right = (read_weights(folder / f"{name}.safetensors") for name in ("whole", "edge"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert learn(model, monkeypatch)[1] == [], "a finished file is kept"
    with pytest.raises(LatentMotionError, match="is there already"):
        learn(model, monkeypatch, steps=3)


@pytest.mark.parametrize("error", [RuntimeError("fell out"), comfy.model_management.OOM_EXCEPTION("injected")])
def test_an_error_inside_a_step_leaves_the_model_as_it_was(error, model, folder, monkeypatch):
    learn(model, monkeypatch, steps=1, file_name="warm")
    comfy.model_management.unload_all_models()
    network = model.model.diffusion_model
    before, weights = traces(network), tiny_host.weights(model)

    def fail(*_: Any) -> None:
        assert not nothing_stands_in(model)
        raise error

    hook = network.out[2].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        learn(model, monkeypatch)
    hook.remove()
    assert traces(network) == before and nothing_stands_in(model)
    tiny_host.assert_same_weights(model, weights)
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def test_recomputing_layers_changes_no_loss(model, folder, monkeypatch):
    runs = [learn(model, monkeypatch, gradient_checkpointing=twice, file_name=f"r{twice}", steps=3)[1]
            for twice in (False, True)]  # fmt: skip
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_loras_on_the_model_stay_out_of_the_differences(model, folder, monkeypatch):
    lora = model.clone()
    slot = slots_of(model)[0][0]
    key = f"{slot}.attn1.to_q.weight"
    lora.add_patches({"diffusion_model." + names_of(model)[key]: ("diff", (torch.ones(32, 32),))})
    learn(lora, monkeypatch, learning_rate=0.0, steps=1)
    assert not read_weights(folder / "edge.safetensors")[f"{slot}.attn1.to_q.diff"].any()
    tiny_host.sample(lora, 1, steps=1)
    patched = model.model.state_dict()[f"diffusion_model.{names_of(model)[key]}"]
    assert not torch.equal(original_weight(lora)(key), patched)


@pytest.mark.parametrize("kind", [comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION], ids=["noise", "v"])
def test_the_loss_is_of_what_the_network_predicts(kind: type) -> None:
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, kind):
        pass

    with torch.inference_mode(False):
        sampling, latents = Sampling(), torch.randn(FRAMES, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    said: dict[str, Tensor] = {}

    def apply_model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        said.update(x=x, sigma=sigma.view(-1, 1, 1, 1), out=torch.full_like(x, 0.3))
        return sampling.calculate_denoised(sigma, said["out"], x)

    base = SimpleNamespace(model_sampling=sampling, diffusion_model=nn.Linear(1, 1), apply_model=apply_model)
    loss_of = train.noise_loss(base, Clips((latents,), ("a",), FRAMES, drop=0.0), lambda captions: {}, {}, ONE)
    loss = loss_of(0, torch.Generator().manual_seed(0))
    sigma, noise = said["sigma"], (said["x"] - latents) / said["sigma"]
    target = noise if kind is comfy.model_sampling.EPS else (noise - sigma * latents) / (1 + sigma**2).sqrt()
    assert float(loss) == pytest.approx(float((said["out"] - target).square().mean()), rel=1e-3)


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_frames_are_taken_from_the_first_on(stride: int) -> None:
    pictures = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 8, 8, 3)
    film = clip_of_images(pictures, Fraction(8))
    taken = tune.chosen_frames(film, 7, stride)
    assert torch.cat(list(taken.chunks()))[:, 0, 0, 0].tolist() == [stride * i for i in range(7)]
    assert taken.frames == 7


def test_the_image_model_is_named_after_its_file() -> None:
    graph = {"1": {"inputs": {"ckpt_name": "v1-5.safetensors"}}, "2": {"inputs": {"model": ["1", 0], "lora_name": "x"}},
             "3": {"inputs": {"model": ["2", 0]}}, "4": {"inputs": {"model": ["4", 0]}}}  # fmt: skip
    assert tune.loader_name(graph, "3") == "v1-5.safetensors"
    assert tune.loader_name(graph, "4") == tune.loader_name(None, "3") == tune.loader_name(graph, "9") == ""


def test_what_cannot_work_is_said(model, folder, monkeypatch):
    with pytest.raises(LatentMotionError, match="has 4 frames, and 4 frames with a stride of 2 need 7"):
        learn(model, monkeypatch, stride=2)
    with pytest.raises(LatentMotionError, match="has no prompt"):
        learn(model, monkeypatch, prompt=" ")
    with pytest.raises(LatentMotionError, match="makes video already"):
        learn(apply_frame_attention(model, FrameAttention()), monkeypatch)
    for name in ("../outside", "a\0b", "long" * 60):
        with pytest.raises(ValueError, match="is no name for a file"):
            learn(model, monkeypatch, file_name=name)
    with pytest.raises(ValueError, match="not one of its choices"):
        learn(model, monkeypatch, existing="maybe")


def test_a_clip_is_drawn_on_the_way_and_changes_nothing(model, folder, monkeypatch):
    strips, draw = [], Samples.strip
    monkeypatch.setattr(Samples, "strip", lambda self: strips.append(draw(self)) or strips[-1])
    _, plain = learn(model, monkeypatch, file_name="plain")
    _, watched = learn(model, monkeypatch, file_name="watched", sample_every=3)
    assert watched == plain
    assert [strip.width for strip in strips] == [480, 480]
    assert strips[0].tobytes() != strips[1].tobytes()


def test_the_node_in_a_graph_says_which_file_it_belongs_to(model, folder, monkeypatch, pack_nodes):
    """As the host calls it, hidden inputs and all."""
    monkeypatch.setattr(train, "TrainingProgress", Recorder())
    node = pack_nodes["LatentMotionTuneVideoModel"]
    graph = {"1": {"inputs": {"unet_name": "dream.safetensors"}}, "2": {"inputs": {"model": ["1", 0]}}}
    hidden = {io.Hidden.prompt: graph, io.Hidden.unique_id: "2"}
    clone = node.PREPARE_CLASS_CLONE(hidden | {"hidden_inputs": hidden})  # newer hosts look one level deeper
    widgets = {**WIDGETS, "steps": 1}
    clone.execute(model=model, clip=Text(), vae=Pictures(), video=clip_of_a_moving_edge(), prompt="an edge", **widgets)
    assert "dream.safetensors" in read_metadata(folder / "edge.safetensors")["base"]
