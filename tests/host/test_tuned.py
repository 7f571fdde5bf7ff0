"""Tuned video models on the host: the same numbers as an independent float64 network, from every kind of file.

The other side is `bench/tav_reference.py`, written from the sheet with the release's names and five axes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.supported_models
import pytest
import tiny_host
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, Pair, motion_module, relative_error
from latentmotion.bench import tav
from latentmotion.bench.tav import STEP, parity, predicted_noise, trained_parameters, tuned_file
from latentmotion.bench.tav_reference import TunedUNet
from latentmotion.host import paths
from latentmotion.host.attention import FrameBlock, apply_frame_attention
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.options import frame_attention
from latentmotion.host.tuned import TemporalBlock, apply_tuned, base_of, names_of, original_weight, slots_of
from latentmotion.motion_modules.errors import CheckpointError, ClipError, ModelMismatchError
from latentmotion.motion_modules.tune_a_video.checkpoint import TunedFile, portable, read_tuned
from latentmotion.motion_modules.tune_a_video.network import TemporalLayer, trained_shapes
from latentmotion.sampling.windows import WindowPlan
from latentmotion.training.checkpoint import save_weights
from torch import Tensor

EXACT, FRAMES = 1e-5, 3


@pytest.fixture(scope="module")
def _pair() -> Pair:
    with torch.inference_mode():
        return Pair(tiny_host.sd15(**SMALL), motion_module(widths=(32, 64), layers=1), None)


@pytest.fixture
def pair(_pair: Pair) -> Iterator[Pair]:
    """One image model for all tests; each must leave it as it was, down to the picture it draws."""
    yield _pair
    comfy.model_management.interrupt_current_processing(False)
    assert not any(isinstance(m, (FrameBlock, TemporalBlock)) for m in _pair.plain.model.modules())
    comfy.model_management.unload_all_models()
    _pair.assert_untouched()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths.folder_paths, "get_full_path", lambda _, name: str(tmp_path / name))
    return tmp_path


@pytest.fixture
def load(run_node: Callable) -> Callable[..., ModelPatcher]:
    def node(model: ModelPatcher, name: str, strength: float = 1.0, frames: int = 0) -> ModelPatcher:
        return run_node("LatentMotionLoadTunedVideoModel", model=model, tuned_model=name, strength=strength,
                        frames=frames)[0]  # fmt: skip

    return node


def noise(frames: int = FRAMES, seed: int = 7) -> Tensor:
    return torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def text(model: ModelPatcher) -> Tensor:
    return tiny_host.conditioning(model, 1, tokens=5)[0][0]


def reference(model: ModelPatcher, weights: dict[str, Tensor], x: Tensor, **changes: Any) -> Tensor:
    sigma = model.get_model_object("model_sampling").sigmas[STEP].double()
    scaled = (x.double() / (sigma**2 + 1) ** 0.5).transpose(0, 1)[None]
    return TunedUNet(weights, 8, **changes)(scaled, STEP, text(model))[0].transpose(0, 1)


def differences(model: ModelPatcher, file: TunedFile, name: str = "tiny.safetensors") -> tuple[dict, dict]:
    """The same network as a file of differences to `model`."""
    base = original_weight(model)
    changes = {key: file.weights[key] - base(key) for key in trained_shapes(file.slots) if key in file.weights}
    return portable(file.temporal, changes, base_of(model, name))


def test_whole_network_equals_float64() -> None:
    """All 16 transformers of SD1.x's layout, at an eighth of its width or less."""
    model = tiny_host.sd15()
    file = tuned_file(model)
    assert len(file.slots) == 16 and parity(model, file, FRAMES, 8) < EXACT


def test_each_part_counts(pair: Pair) -> None:
    """A float64 network that lacks one part is another network, so the parity test can tell."""
    model, x = pair.plain, noise()
    file = tuned_file(model)
    whole = {**file.weights, **file.temporal}
    found = predicted_noise(apply_tuned(model, file), x, text(model))
    assert relative_error(found, reference(model, whole, x)) < EXACT
    base = {name: original_weight(model)(name) for name in file.weights}
    lacking = (
        (file.weights, {}),
        ({**base, **file.temporal}, {}),
        (whole, {"own_frame": True}),
        (whole, {"joint": False}),
    )
    for weights, changes in lacking:
        assert relative_error(found, reference(model, weights, x, **changes)) > 1e-2


def test_what_is_trained_in_sd15() -> None:
    """The authors' 112 tensors and 74,354,880 numbers, counted on the host's network of SD1.5's shape."""
    config = comfy.supported_models.SD15(tiny_host.sd15_config(model_channels=320, context_dim=768))
    unet = UNetModel(**config.unet_config, device="meta", operations=comfy.ops.disable_weight_init)
    model = type("Shape", (), {"get_model_object": lambda self, name: unet, "model": self_of(config)})()
    slots = slots_of(model)
    assert trained_parameters(slots) == 74_354_880 and len(trained_shapes(slots)) == 112
    own = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    names = names_of(model)
    assert all(own[names[key]] == shape for key, shape in trained_shapes(slots).items() if "attn_temp" not in key)
    halves = sum(torch.Size(shape).numel() for shape in trained_shapes(slots).values()) * 2
    assert round(halves / 1e6) == 149


def self_of(config: Any) -> Any:
    return type("Base", (), {"model_config": config})()


def test_files_of_every_kind_are_one_network(pair: Pair, folder: Path, load: Callable) -> None:
    model, x = pair.plain, noise()
    file = tuned_file(model)
    expected = predicted_noise(apply_tuned(model, file), x, text(model))
    whole = {**file.weights, **file.temporal}
    (folder / "jeep" / "unet").mkdir(parents=True)
    torch.save(whole, folder / "jeep" / "unet" / "diffusion_pytorch_model.bin")
    (folder / "jeep" / "unet" / "config.json").write_text(json.dumps({"attention_head_dim": 8}))
    save_weights(folder / "whole.safetensors", whole, {}, torch.float32)
    tensors, about = differences(model, file)
    save_weights(folder / "changes.safetensors", tensors, {"steps": 500}, torch.float32, about)
    for name in ("jeep/unet/diffusion_pytorch_model.bin", "whole.safetensors", "changes.safetensors"):
        tuned = load(model, name)
        assert relative_error(predicted_noise(tuned, x, text(model)), expected) < EXACT, name
        queries = [key for key in tuned.patches if "to_q" in key]
        assert len(queries) == len(tuned.patches) == 2 * len(file.slots), name


def test_a_whole_file_on_another_image_model(pair: Pair) -> None:
    """Everything that differs is taken from the file, so it is the same network."""
    other = tiny_host.sd15(seed=3, **SMALL)
    file, x = tuned_file(other), noise()
    found = predicted_noise(apply_tuned(pair.plain, file), x, text(other))
    assert relative_error(found, predicted_noise(apply_tuned(other, file), x, text(other))) < EXACT


def test_a_whole_file_on_its_own_image_model_in_a_smaller_type() -> None:
    """An image model kept as float16 on the disk and loaded as bfloat16 was rounded twice, and is the same one."""
    model = tiny_host.sd15(**SMALL)
    file = tuned_file(model)
    twice = tiny_host.sd15(dtype=torch.bfloat16, compute_dtype=torch.float32, **SMALL)
    for parameter in twice.model.diffusion_model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.zeros(1, dtype=torch.bfloat16)))
    assert len(apply_tuned(twice, file).patches) == 2 * len(file.slots)


def test_strength_is_between_untuned_and_tuned(pair: Pair) -> None:
    file, x, model = tuned_file(pair.plain), noise(), pair.plain
    none, half, whole = (predicted_noise(apply_tuned(model, file, s), x, text(model)) for s in (0.0, 0.5, 1.0))
    untuned = apply_frame_attention(
        model, frame_attention(keys_from="first and previous", joint_group_norm=True, frames=0)
    )
    assert torch.equal(none, predicted_noise(untuned, x, text(model)))
    assert 0 < (half - none).norm() < (whole - none).norm()


def test_batches_clips_and_windows(pair: Pair) -> None:
    file, model = tuned_file(pair.plain), pair.plain
    tuned = apply_tuned(model, file, frames=FRAMES)
    two = predicted_noise(tuned, torch.cat((noise(), noise(seed=8))), text(model))
    assert relative_error(two[FRAMES:], predicted_noise(tuned, noise(seed=8), text(model))) < EXACT
    with pytest.raises(ClipError, match="4 images, which 3 frames"):
        predicted_noise(tuned, noise(4), text(model))
    tuned = apply_tuned(model, file)
    windowed = apply_context(tuned, SlidingContext(WindowPlan(length=FRAMES, overlap=1)))
    long, short = (tiny_host.sample(windowed, count, steps=1) for count in (5, FRAMES))
    assert torch.isfinite(long).all() and torch.equal(short, tiny_host.sample(tuned, FRAMES, steps=1))


def test_st_attention_behind_keeps_the_frames(pair: Pair) -> None:
    """0 frames of it are not those of the whole batch: that is set on Load Tuned Video Model."""
    file, x = tuned_file(pair.plain), torch.cat((noise(), noise(seed=8)))
    tuned = apply_tuned(pair.plain, file, frames=FRAMES)
    same = frame_attention(keys_from="first and previous", joint_group_norm=True, frames=0)
    then = apply_frame_attention(tuned, same)
    assert torch.equal(predicted_noise(then, x, text(then)), predicted_noise(tuned, x, text(tuned)))
    with pytest.raises(ClipError, match="4 images, which 3 frames"):
        predicted_noise(then, noise(4), text(then))
    whole = apply_frame_attention(tuned, frame_attention(keys_from="full", joint_group_norm=True, frames=4))
    assert torch.isfinite(predicted_noise(whole, x[:4], text(whole))).all(), "a number of its own counts"


def test_with_a_motion_module_in_either_order(pair: Pair) -> None:
    file, x, model = tuned_file(pair.plain), noise(), pair.plain
    first = pair.video(base=apply_tuned(model, file))
    then = apply_tuned(pair.video(), file)
    a, b = (predicted_noise(made, x, text(model)) for made in (first, then))
    assert torch.equal(a, b)
    assert relative_error(a, predicted_noise(apply_tuned(model, file), x, text(model))) > 1e-2


def test_pieces_after_running_out_of_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is made again with less; the clip stays the same."""
    tuned, left = apply_tuned(pair.plain, tuned_file(pair.plain)), [2]
    expected = tiny_host.sample(tuned, FRAMES, steps=1)
    real, seen = TemporalLayer.forward, []

    def short(self: Any, x: Tensor, call: Any) -> Tensor:
        seen.append(call.slab_bytes)
        left[0] -= 1
        if left[0] >= 0:
            raise comfy.model_management.OOM_EXCEPTION("injected: out of memory")
        return real(self, x, call)

    with monkeypatch.context() as patch:
        patch.setattr(TemporalLayer, "forward", short)
        assert relative_error(tiny_host.sample(tuned, FRAMES, steps=1), expected) < 1e-4
    assert len(set(seen)) == 2 and min(seen) == max(seen) // 2


@pytest.mark.parametrize("ending", ["cancelled", "failed", "out of memory"])
def test_a_run_that_breaks_leaves_the_model_as_it_was(ending: str, pair: Pair) -> None:
    """Inside the last T-Attn, with weights patched and every stand-in in place; the fixture compares bits."""

    def breaking(*_: Any) -> None:
        standing.append(sum(isinstance(module, TemporalBlock) for module in unet.modules()))
        if ending == "cancelled":
            comfy.model_management.interrupt_current_processing(True)
        elif ending == "failed":
            raise RuntimeError("injected failure")
        else:
            raise comfy.model_management.OOM_EXCEPTION("injected: out of memory")

    errors = {"cancelled": comfy.model_management.InterruptProcessingException, "failed": RuntimeError}
    tuned, unet, standing = apply_tuned(pair.plain, tuned_file(pair.plain)), pair.plain.model.diffusion_model, []
    network = tuned.get_additional_models_with_key("latentmotion_tuned")[0].model
    hook = list(network.layers().values())[-1].norm_temp.register_forward_pre_hook(breaking)
    try:
        with pytest.raises(errors.get(ending, comfy.model_management.OOM_EXCEPTION)):
            tiny_host.sample(tuned, FRAMES)
    finally:
        hook.remove()
    assert standing[0] == 7


def test_differences_on_another_image_model_are_refused(pair: Pair) -> None:
    tensors, about = differences(pair.plain, tuned_file(pair.plain), "v1-4.ckpt")
    file = read_tuned(tensors, about, "jeep.safetensors")
    with pytest.raises(ModelMismatchError, match="differences to the image model v1-4.ckpt, and this MODEL was loaded"):
        apply_tuned(tiny_host.sd15(seed=3, **SMALL), file)
    half = tiny_host.sd15(dtype=torch.float16, compute_dtype=torch.float32, **SMALL)
    apply_tuned(half, file)  # the same numbers, rounded
    lora = pair.plain.clone()
    key = "diffusion_model." + names_of(lora)[f"{file.slots[0][0]}.attn1.to_k.weight"]
    lora.add_patches({key: ("diff", (torch.ones(32, 32),))})
    predicted_noise(lora, noise(), text(lora))  # loaded with the patch in place
    apply_tuned(lora, file)  # the model below the LoRA is the one that counts
    apply_tuned(pair.plain, file)


def test_what_does_not_belong_is_said(pair: Pair, folder: Path, load: Callable) -> None:
    model = pair.plain
    file = tuned_file(model)
    with pytest.raises(ModelMismatchError, match="is a tuned video model already"):
        apply_tuned(apply_tuned(model, file), file)
    with pytest.raises(ModelMismatchError, match="16 transformer blocks of widths 32, 64, 128, and this MODEL is"):
        apply_tuned(model, tuned_file(tiny_host.sd15()))
    save_weights(folder / "unet" / "x.safetensors", {**file.weights, **file.temporal}, {}, torch.float32)
    (folder / "unet" / "config.json").write_text(json.dumps({"attention_head_dim": [4, 4]}))
    with pytest.raises(ModelMismatchError, match="has 4 attention heads in down_blocks.0"):
        load(model, "unet/x.safetensors")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        load(model, "unet/x.safetensors")


def test_the_benchmark_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow network of SD1.5's layout; the real one is `run.py bench tav`."""
    monkeypatch.setattr(tav, "SD15", tiny_host.sd15_config())
    arguments = ["--only", "full_size", "--size", "64", "--rounds", "1"]
    assert tav.main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tav.parity"] < EXACT and figures["tav.trained_parameters"] > 0
    assert 1 < figures["tav.step_flops_over_plain"] < 2 and figures["tav.step_over_plain"] > 0


def test_the_memory_of_a_tuning_step_is_foreseen() -> None:
    errors = tav.estimate_errors(((8, 8, 8), (4, 16, 16)), width=32)
    assert len(errors) == 4
    assert max(map(abs, errors.values())) < 0.25
