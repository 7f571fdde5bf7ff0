"""Motion modules and MotionLoRAs that we write, read by diffusers' own loaders and by the rules of AnimateDiff-Evolved.

diffusers converts the authors' motion modules when it loads them, and their MotionLoRAs with a script of its repository
(`scripts/convert_animatediff_motion_lora_to_diffusers.py`), whose renaming is repeated here. It takes the norm of a
motion module over all frames, so networks are compared with that norm.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import reference_motion as reference
import torch
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from latentmotion.motion_modules.animatediff.lora import read_motion_lora
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.publish import new_spec, published
from latentmotion.motion_modules.animatediff.spec import MotionSpec
from latentmotion.motion_modules.call import MotionCall
from latentmotion.motion_modules.files import read_weights
from latentmotion.training.checkpoint import save_weights
from latentmotion.training.lora import LowRankSet, attention_layers, published_pairs
from latentmotion.training.recipe import Recipe
from torch import Tensor

RECIPE = Recipe("exchange", steps=1, batch=1, learning_rate=0.1)
WIDTHS, LAYERS, FRAMES = (32, 64), 1, 4
SD15 = (320, 640, 1280, 1280)
EXACT = 1e-5
SCRIPT = ((".temporal_transformer", ""), (".attention_blocks.0", ".attn1"), (".attention_blocks.1", ".attn2"))
ALPHA, RANK = 8.0, 4


@pytest.fixture(scope="module")
def network() -> MotionModel:
    made = MotionModel(new_spec(WIDTHS, LAYERS, True))
    made.load_state_dict(reference.random_weights({k: v.shape for k, v in made.state_dict().items()}, 0))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def module_file(network: MotionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A motion module as training writes it, in float32 so that numbers can be compared."""
    path = tmp_path_factory.mktemp("exchange") / "module.safetensors"
    save_weights(path, published(network.spec, network.state_dict()), RECIPE.told(), torch.float32)
    return path


def lora_file(network: MotionModel, path: Path) -> dict[str, Tensor]:
    """Write a MotionLoRA as training does; what it adds to each weight of the module."""
    changes = LowRankSet(network, attention_layers(network, ()), RANK)
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in changes.named_parameters()}
    save_weights(path, published_pairs(changes, ALPHA / RANK, weights), RECIPE.told(), torch.float32)
    return {f"{layer}.weight": ALPHA / RANK * up @ down for layer, down, up in changes.pairs(weights)}


def adapter_of(spec: MotionSpec, folder: Path) -> Any:
    """An empty MotionAdapter of diffusers for this layout, its configuration saved in a folder."""
    library = pytest.importorskip("diffusers")
    made = library.MotionAdapter(block_out_channels=WIDTHS, motion_layers_per_block=LAYERS,
                                 use_motion_mid_block=spec.has_mid, motion_max_seq_length=spec.positions)
    made.save_config(folder)
    return made


def test_diffusers_reads_a_motion_module_and_computes_the_same(network: MotionModel, module_file: Path,
                                                               tmp_path: Path) -> None:
    empty = adapter_of(network.spec, tmp_path)
    theirs = type(empty).from_single_file(str(module_file), config=str(tmp_path))
    assert theirs.state_dict().keys() == empty.state_dict().keys()
    assert all(tensor.device.type == "cpu" for tensor in theirs.state_dict().values())
    generator = torch.Generator().manual_seed(1)
    for slot, channels in network.spec.slots:
        x = torch.randn(FRAMES, channels, 3, 2, generator=generator)
        layer = theirs.get_submodule(slot).requires_grad_(False)
        ours = network.transformers()[slot](x, MotionCall(FRAMES, torch.arange(FRAMES)), True)
        assert reference.relative_error(ours, layer(x, num_frames=FRAMES)) < EXACT, slot
        assert reference.relative_error(ours, x) > 0.1, "the module does something"


@pytest.mark.parametrize(("widths", "mid", "kind"), [
    (SD15, True, "animatediff_v2"), (SD15, False, "animatediff_v3"), (SD15[:3], False, "animatediff_sdxl_beta"),
])  # fmt: skip
def test_diffusers_tells_our_layouts_apart(widths: tuple[int, ...], mid: bool, kind: str) -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    spec = new_spec(widths, 2, mid)
    assert utils.infer_diffusers_model_type(published(spec, MotionModel(spec, device="meta").state_dict())) == kind


def test_we_read_what_diffusers_saves(network: MotionModel, module_file: Path, tmp_path: Path) -> None:
    empty = adapter_of(network.spec, tmp_path)
    theirs = type(empty).from_single_file(str(module_file), config=str(tmp_path))
    theirs.save_pretrained(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    file = read_motion_module(read_weights(path), path.name)
    assert (file.spec.slots, file.spec.variant, file.spec.positions) == (
        network.spec.slots, network.spec.variant, network.spec.positions)  # fmt: skip
    assert all(torch.equal(file.weights[name], tensor) for name, tensor in network.state_dict().items())


def as_diffusers(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that diffusers' script gives a MotionLoRA of the authors' layout."""
    renamed = {}
    for name, tensor in file.items():
        for old, new in SCRIPT:
            name = name.replace(old, new)
        renamed[f"unet.{name}"] = tensor
    return renamed


def test_diffusers_reads_a_motion_lora_as_the_same_changes(network: MotionModel, tmp_path: Path) -> None:
    convert = pytest.importorskip("diffusers.utils.state_dict_utils").convert_unet_state_dict_to_peft
    scale_of = pytest.importorskip("diffusers.utils.peft_utils").get_peft_kwargs
    expected = lora_file(network, tmp_path / "lora.safetensors")
    saved = as_diffusers(read_weights(tmp_path / "lora.safetensors"))
    theirs = convert({name.removeprefix("unet."): tensor for name, tensor in saved.items()})
    ranks = {f"^{name}": tensor.shape[1] for name, tensor in theirs.items() if "lora_B" in name}
    config = scale_of(ranks, None, theirs)
    assert config["lora_alpha"] == config["r"] == RANK and not config["alpha_pattern"], "strength 1 is our strength 1"
    layers = dict(adapter_of(network.spec, tmp_path).named_parameters())
    back = read_motion_lora(saved, "lora").parts
    assert back.keys() == expected.keys()
    for name, delta in expected.items():
        layer = name.removesuffix(".weight")
        for old, new in SCRIPT:
            layer = layer.replace(old, new)
        assert layers[f"{layer}.weight"].shape == delta.shape
        added = theirs.pop(f"{layer}.lora_B.weight") @ theirs.pop(f"{layer}.lora_A.weight")
        assert torch.allclose(added, delta, atol=1e-5)
        assert torch.allclose(back[name].up @ back[name].down, delta, atol=1e-5) and back[name].alpha is None
    assert not theirs, "diffusers finds a place for every tensor"


def evolved_keys(spec: MotionSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of AnimateDiff-Evolved's network for SD1.5, which takes a file only when none is missing or left."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, c in spec.slots:
        front = f"{slot}.temporal_transformer"
        shapes |= {f"{front}.{name}.{end}": (c, c) if end == "weight" and "proj" in name else (c,)
                   for name in ("norm", "proj_in", "proj_out") for end in ("weight", "bias")}  # fmt: skip
        block = f"{front}.transformer_blocks.0"
        for i in range(2):
            attention = f"{block}.attention_blocks.{i}"
            shapes |= {f"{attention}.to_{part}.weight": (c, c) for part in ("q", "k", "v", "out.0")}
            shapes |= {f"{attention}.to_out.0.bias": (c,), f"{attention}.pos_encoder.pe": (1, 32, c)}
        shapes |= {f"{block}.{name}.{end}": (c,) for name in ("norms.0", "norms.1", "ff_norm")
                   for end in ("weight", "bias")}  # fmt: skip
        shapes |= {f"{block}.ff.net.0.proj.weight": (8 * c, c), f"{block}.ff.net.0.proj.bias": (8 * c,),
                   f"{block}.ff.net.2.weight": (c, 4 * c), f"{block}.ff.net.2.bias": (c,)}  # fmt: skip
    return shapes


@pytest.mark.parametrize("mid", [True, False])
def test_a_motion_module_is_what_animatediff_evolved_takes(mid: bool) -> None:
    spec = new_spec(SD15, 2, mid)
    file = published(spec, MotionModel(spec, device="meta").state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in file.items()} == evolved_keys(spec)
    assert all("temporal" in name for name in file), "it leaves out every other tensor"
    assert {int(name.split(".")[1]) for name in file if name.startswith("down_blocks.")} == {0, 1, 2, 3}, "SD1.5 by it"


def test_a_motion_lora_is_what_animatediff_evolved_takes(network: MotionModel, tmp_path: Path) -> None:
    """It strips these parts of a name to find the weight, adds up @ down times the strength, and knows no alpha."""
    expected = lora_file(network, tmp_path / "lora.safetensors")
    file, found = read_weights(tmp_path / "lora.safetensors"), {}
    assert all("temporal" in name for name in file) and not any("alpha" in name for name in file)
    for name, down in file.items():
        if "up." not in name:
            weight = re.sub(r"processor\.|_lora|down\.", "", name).replace("to_out.", "to_out.0.")
            found[weight] = file[name.replace(".down.", ".up.")] @ down
    assert found.keys() == expected.keys() <= network.state_dict().keys() and 2 * len(found) == len(file)
    assert all(torch.allclose(found[name], delta, atol=1e-5) for name, delta in expected.items())
