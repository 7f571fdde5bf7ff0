"""Motion module files: every published layout is told apart and read whole, everything else gets its own sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.spec import MotionSpec, Schedule
from latentmotion.motion_modules.errors import CheckpointError
from latentmotion.motion_modules.files import read_weights
from motion_files import (
    NARROW,
    TO_DIFFUSERS,
    diffusers,
    hotshot,
    image_unet,
    module,
    motion_lora,
    plain,
    prefixed,
    renamed,
    slots,
)
from safetensors.torch import save_file
from torch import Tensor, nn

FULL = {4: specs.SD15_LEVELS, 3: specs.SDXL_LEVELS}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Mapping[str, Any]]] = {
    "original": lambda f: f,
    "without positions": plain,
    "state_dict wrapper with extras": lambda f: {"state_dict": f | {"animatediff_config": {"a": [1]}}, "epoch": 3,
                                                 "global_step": 7, "optimizer": [f]},
    "extras at the top": lambda f: {**f, "animatediff_config": "unet: x", "epoch": 1, 3: None},
    "training dump of the whole UNet": lambda f: {"epoch": 1, "global_step": 2,
                                                  "state_dict": prefixed(f | image_unet(), "module.")},
    "compiled and distributed": lambda f: prefixed(f, "module.", "_orig_mod."),
    "unet prefix": lambda f: prefixed(f, "unet."),
    "diffusers adapter": diffusers,
    "diffusers adapter without positions": lambda f: diffusers(plain(f)),
    "diffusers UNetMotionModel dump": lambda f: diffusers(f) | image_unet(),
    "nested under a model key": lambda f: {"model": f, "step": 1},
    "Hotshot names": hotshot,
    "Parameters": lambda f: {name: nn.Parameter(tensor) for name, tensor in f.items()},
}


@pytest.mark.parametrize("mid", [False, True], ids=["without mid", "with mid"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(layout: str, mid: bool) -> None:
    file = module(mid=mid)
    read = read_motion_module(LAYOUTS[layout](file), "x.ckpt")
    assert_same(read.weights, plain(file))
    assert read.spec.slots == slots(mid=mid) and read.spec.levels == NARROW and read.spec.has_mid == mid
    assert (read.spec.attentions, read.spec.heads, read.spec.groups) == (2, 8, 32)
    network = MotionModel(read.spec)
    network.load_state_dict(read.weights)
    assert_same(network.state_dict(), plain(file))


# variant, levels, mid, rows of positions, layout -> schedule, joint norms (resnet, out, transformer, motion)
PUBLISHED = {
    "mm_sd_v15": (specs.V1, 4, False, 24, "original", Schedule.LINEAR, (True, True, False, False)),
    "mm_sd_v15_v2": (specs.V2, 4, True, 32, "original", Schedule.LINEAR, (False,) * 4),
    "v3_sd15_mm": (specs.V3, 4, False, 32, "original", Schedule.LINEAR, (False,) * 4),
    "mm_sdxl_v10_beta": (specs.SDXL_BETA, 3, False, 32, "original", Schedule.SCALED_LINEAR_SDXL,
                         (False, False, False, True)),
    "hsxl_temporal_layers": (specs.HOTSHOT_XL, 3, False, 24, "Hotshot names", None, (True, True, False, False)),
    "AnimateLCM_sd15_t2v": (specs.ANIMATE_LCM, 4, True, None, "original", Schedule.LINEAR, (False,) * 4),
    "adapter-v1-5": (specs.V1, 4, False, 24, "diffusers adapter", Schedule.LINEAR, (True, True, False, False)),
    "adapter-v1-5-2": (specs.V2, 4, True, 32, "diffusers adapter", Schedule.LINEAR, (False,) * 4),
    "adapter-v1-5-3": (specs.V3, 4, False, 32, "diffusers adapter", Schedule.LINEAR, (False,) * 4),
    "adapter-sdxl-beta": (specs.SDXL_BETA, 3, False, 32, "diffusers adapter", Schedule.SCALED_LINEAR_SDXL,
                          (False, False, False, True)),
}


def identified(layout: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> MotionSpec:
    """The spec of a file of full width whose tensors hold no numbers."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(1, dtype=torch.bool))
    return read_motion_module(layout, "x.ckpt").spec


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_identified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, levels, mid, length, layout, schedule, joint = PUBLISHED[name]
    spec = identified(LAYOUTS[layout](module(FULL[levels], mid, length, device="meta")), monkeypatch)
    assert spec.variant is variant and spec.positions == (length or 64)
    assert spec.family == ("SD1.x / SD2.x" if levels == 4 else "SDXL")
    norms = spec.variant.joint
    assert (norms.resnet, norms.out, norms.transformer, norms.motion) == joint
    assert spec.variant.schedule is schedule
    evolved = spec.variant.joint_as_evolved
    every = (evolved.resnet, evolved.out, evolved.transformer, evolved.motion)
    assert every == ((True,) * 4 if variant in (specs.V1, specs.SDXL_BETA, specs.HOTSHOT_XL) else (False,) * 4)


@pytest.mark.parametrize(("layout", "levels", "mid", "positions"), [
    ("original", 4, False, 32), ("original", 3, False, 32), ("diffusers adapter", 4, True, 32), ("Hotshot names", 3,
                                                                                                False, 24),
])
def test_length_where_the_positions_were_stripped(layout: str, levels: int, mid: bool, positions: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    file = LAYOUTS[layout](module(FULL[levels], mid, None, device="meta"))
    assert identified(file, monkeypatch).positions == positions


@pytest.mark.parametrize("levels", [(32,), (64, 32), (96, 160, 32), (32, 64, 160, 32, 96)])
def test_any_channel_layout(levels: tuple[int, ...]) -> None:
    read = read_motion_module(module(levels, mid=True, length=16), "toy.safetensors")
    assert read.spec.levels == levels and read.spec.positions == 16
    assert ", ".join(map(str, levels)) in read.spec.family


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


CONTAINERS = ["safetensors", "ckpt", "legacy.pth", "safetensors.ckpt", "ckpt.safetensors"]
# torch.load itself does not read fp8 from a legacy file.
STORED = [(dtype, kind) for dtype in DTYPES for kind in CONTAINERS if dtype.itemsize > 1 or kind != "legacy.pth"]


@pytest.mark.parametrize(("dtype", "container"), STORED)
def test_files_come_back_bit_for_bit(dtype: torch.dtype, container: str, tmp_path: Path) -> None:
    """Also under a wrong ending, as files get renamed."""
    file = {name: tensor.to(dtype) for name, tensor in module((32,)).items()}
    path = tmp_path / f"m.{container}"
    if container in ("safetensors", "safetensors.ckpt"):
        save_file(file, path)
    else:
        torch.save({"state_dict": file, "epoch": 1}, path, _use_new_zipfile_serialization="legacy" not in container)
    read = read_motion_module(read_weights(path), path.name)
    assert all(tensor.dtype is dtype for tensor in read.weights.values())
    assert_same({n: t.double() for n, t in read.weights.items()}, {n: t.double() for n, t in plain(file).items()})


def test_diffusers_own_files(tmp_path: Path) -> None:
    """MotionAdapter and UNetMotionModel, saved by diffusers itself."""
    library = pytest.importorskip("diffusers")
    shape = {"block_out_channels": (32, 64), "motion_layers_per_block": 2, "motion_num_attention_heads": 8,
             "motion_max_seq_length": 24}
    adapter = library.MotionAdapter(**shape, use_motion_mid_block=True)
    adapter.save_pretrained(tmp_path / "adapter")
    unet = library.UNetMotionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_max_seq_length=24, num_attention_heads=8,
    )
    unet.load_motion_modules(adapter)
    unet.save_pretrained(tmp_path / "unet")
    expected = {name: tensor for name, tensor in adapter.state_dict().items() if "pos_embed" not in name}
    for folder in ("adapter", "unet"):
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        read = read_motion_module(read_weights(path), path.name)
        assert read.spec.slots == slots((32, 64), mid=True) and read.spec.positions == 24
        assert_same(renamed(read.weights, *TO_DIFFUSERS), expected)


def sparsectrl() -> dict[str, Tensor]:
    motion = {n: t for n, t in module().items() if n.startswith("down_blocks") and "attention_blocks.1" not in n}
    return motion | image_unet() | {"controlnet_cond_embedding.weight": torch.zeros(32, 5, 3, 3),
                                    "controlnet_down_blocks.0.weight": torch.zeros(32, 32, 1, 1)}


def domain_adapter() -> dict[str, Tensor]:
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    return {f"{stem}_lora.down.weight": torch.zeros(4, 32), f"{stem}_lora.up.weight": torch.zeros(32, 4)}


def some(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


QKV = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.qkv_merge"
NINE = {"conv_in.weight": torch.zeros(32, 9, 3, 3), "conv_in.bias": torch.zeros(32)}
REFUSED: dict[str, tuple[Callable[[], Mapping[str, Any]], str]] = {
    "PIA": (lambda: module() | NINE, "is PIA,"),
    "PIA in diffusers' names": (lambda: diffusers(module()) | NINE, "is PIA,"),
    "PIA wrapped": (lambda: {"state_dict": prefixed(module() | NINE, "module.")}, "is PIA,"),
    "AnimateLCM-I2V": (lambda: module(mid=True, length=None) | some("img_encoder.conv.weight"), "is AnimateLCM-I2V"),
    "FancyVideo by its marker": (lambda: module() | NINE | some("FancyVideo"), "is a FancyVideo module"),
    "FancyVideo by its embeddings": (lambda: module() | NINE | some("fps_embedding.linear.weight") |
                                     {"FancyVideo": True}, "is a FancyVideo module"),
    "SparseCtrl": (sparsectrl, "is a SparseCtrl encoder"),
    "SparseCtrl nested": (lambda: {"controlnet": prefixed(sparsectrl(), "module.")}, "is a SparseCtrl encoder"),
    "SparseCtrl prefixed": (lambda: prefixed(sparsectrl(), "controlnet."), "is a SparseCtrl encoder"),
    "SparseCtrl scribble": (lambda: renamed(sparsectrl(), ("embedding.weight", "embedding.conv_in.weight")),
                            "is a SparseCtrl encoder"),
    "MotionLoRA": (motion_lora, "is a MotionLoRA.*Load MotionLoRA"),
    "MotionLoRA nested": (lambda: {"state_dict": motion_lora()}, "is a MotionLoRA.*Load MotionLoRA"),
    "MotionLoRA of diffusers": (lambda: prefixed(renamed(motion_lora(), *TO_DIFFUSERS), "unet."), "is a MotionLoRA"),
    "domain adapter": (lambda: {"state_dict": domain_adapter(), "animatediff_config": ""},
                       "is a LoRA for the image model, such as the domain adapter"),
    "image LoRA": (lambda: some("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
                                "lora_unet_down_blocks_0_attentions_0_proj_in.alpha"), "is a LoRA for an image"),
    "image LyCORIS": (lambda: some("lora_unet_input_blocks_1_1_proj_in.hada_w1_a"), "is a LoRA for an image"),
    "image checkpoint": (lambda: {"state_dict": some("model.diffusion_model.input_blocks.0.0.weight",
                                                     "first_stage_model.decoder.up.0.block.0.conv1.weight")},
                         "is a whole image checkpoint"),
    "image UNet": (image_unet, "is a UNet for images"),
    "ControlNet of diffusers": (lambda: image_unet() | some("controlnet_cond_embedding.conv_in.weight",
                                                            "controlnet_down_blocks.0.weight"), "is a ControlNet"),
    "ControlNet of LDM": (lambda: some("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
                          "is a ControlNet"),
    "VAE": (lambda: some("decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"), "is a VAE"),
    "VAE of diffusers": (lambda: some("decoder.up_blocks.0.resnets.0.conv1.weight"), "is a VAE"),
    "CameraCtrl": (lambda: some("encoder.conv_in.weight", f"{QKV}.weight", f"{QKV}.bias"), "is a CameraCtrl module"),
    "CameraCtrl as trained": (lambda: {"pose_encoder_state_dict": some("unshuffle.weight"),
                                       "attention_processor_state_dict": some(f"{QKV}.weight")},
                              "is a CameraCtrl module"),
    "MotionCtrl": (lambda: some(QKV.replace("processor.qkv_merge", "cc_projection.weight")), "is a MotionCtrl"),
    "text encoder": (lambda: some("text_model.encoder.layers.0.mlp.fc1.weight"), "holds no motion module"),
    "empty": (dict, "holds no tensors at all"),
    "no tensors": (lambda: {"epoch": 1, "state_dict": {"a": "b"}}, "holds no tensors at all"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_named_for_what_they_are(kind: str) -> None:
    make, sentence = REFUSED[kind]
    with pytest.raises(CheckpointError, match=f"^choice.ckpt {sentence}") as caught:
        read_motion_module(make(), "choice.ckpt")
    assert str(caught.value).endswith(".")


def test_every_refusal_has_a_sentence_of_its_own() -> None:
    """Kinds that differ in the first part of their label get different sentences."""
    said: dict[str, str] = {}
    for kind, (make, _) in REFUSED.items():
        with pytest.raises(CheckpointError) as caught:
            read_motion_module(make(), "x")
        said[kind] = str(caught.value)
    alone = ["PIA", "AnimateLCM-I2V", "FancyVideo by its marker", "SparseCtrl", "MotionLoRA", "domain adapter",
             "image LoRA", "image checkpoint", "image UNet", "ControlNet of LDM", "VAE", "CameraCtrl", "MotionCtrl",
             "text encoder", "empty"]
    assert len({said[kind] for kind in alone}) == len(alone)
