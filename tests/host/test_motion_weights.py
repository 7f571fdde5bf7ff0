"""What changes weights: MotionLoRAs, domain adapters and the types files store, inside the host's own sampling."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.model_management
import folder_paths
import helpers_motion
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import motion_module
from helpers_restored import Watch
from latentmotion.host.motion import MotionModule, manage
from latentmotion.motion_modules.animatediff.checkpoint import MotionFile
from latentmotion.motion_modules.animatediff.spec import SDXL_BETA, V1, V2, Variant
from motion_runs import SAME, Run, apply, draw, error, noise
from safetensors.torch import save_file
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]


# --- MotionLoRA --------------------------------------------------------------------------------------------------

RANK = 2


def lora_file(made: MotionModule, seed: int) -> dict[str, Tensor]:
    """All q, k, v and out pairs of every block, under the published names."""
    generator = torch.Generator().manual_seed(seed)
    file = {}
    for slot, c in made.spec.slots:
        for block in range(2):
            for projection in ("q", "k", "v", "out"):
                stem = (f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.{block}."
                        f"processor.to_{projection}_lora")
                file |= {f"{stem}.down.weight": torch.randn(RANK, c, generator=generator),
                         f"{stem}.up.weight": torch.randn(c, RANK, generator=generator) / c}
    return file


def deltas(file: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, down in file.items():
        if name.endswith(".down.weight"):
            target = name.replace("processor.", "").replace("_lora.down.weight", ".weight")
            found[target.replace("to_out.weight", "to_out.0.weight")] = file[name.replace(".down.", ".up.")] @ down
    return found


@pytest.fixture
def lora_folder(pack_nodes: dict) -> Path:
    folder = Path(folder_paths.folder_names_and_paths["animatediff_motion_lora"][0][0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights_of(patcher: ModelPatcher) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}


def test_motion_loras_add_and_go_without_a_trace(image: ModelPatcher, lora_folder: Path, run_node: Run,
                                                 watched: Watch) -> None:
    made = watched(motion_module())
    before = weights_of(made.patcher)
    files = {name: lora_file(made, seed) for seed, name in enumerate(("zoom.safetensors", "pan.ckpt"))}
    save_file(files["zoom.safetensors"], lora_folder / "zoom.safetensors")
    torch.save({"state_dict": files["pan.ckpt"]}, lora_folder / "pan.ckpt")
    video = apply(run_node, image, made)
    plain = draw(video, noise())

    (one,) = run_node("LatentMotionLoadMotionLora", motion_module=made, motion_lora="zoom.safetensors", strength=0.75)
    (two,) = run_node("LatentMotionLoadMotionLora", motion_module=one, motion_lora="pan.ckpt", strength=-0.5)
    clips = [draw(apply(run_node, image, changed), noise()) for changed in (one, two)]

    comfy.model_management.load_models_gpu([two.patcher])
    during = weights_of(two.patcher)
    wanted = [deltas(file) for file in files.values()]
    assert wanted[0].keys() == wanted[1].keys() and len(wanted[0]) == 8 * len(made.spec.slots)
    for name, weight in before.items():
        change = 0.75 * wanted[0][name] - 0.5 * wanted[1][name] if name in wanted[0] else 0.0
        assert torch.allclose(during[name], weight + change, rtol=1e-5, atol=1e-6), name
    comfy.model_management.unload_all_models()

    after = weights_of(made.patcher)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(draw(video, noise()), plain)
    assert min(error(clip, plain) for clip in clips) > 1e-3 and error(*clips) > 1e-3


def test_strength_zero_and_opposites_cancel(image: ModelPatcher, run_node: Run, watched: Watch) -> None:
    made = watched(motion_module())
    plain = draw(apply(run_node, image, made), noise())
    nothing = helpers_motion.motion_lora(made, strength=0.0)
    both = helpers_motion.motion_lora(helpers_motion.motion_lora(made, strength=1.0), strength=-1.0)
    assert error(draw(apply(run_node, image, nothing), noise()), plain) < SAME
    assert error(draw(apply(run_node, image, both), noise()), plain) < SAME
    assert error(draw(apply(run_node, image, helpers_motion.motion_lora(made)), noise()), plain) > 1e-3


# --- domain adapter ----------------------------------------------------------------------------------------------

def adapter_file(image: ModelPatcher) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A v3 domain adapter for this UNet, and what it adds to each of the host's weights at strength 1."""
    down = {f"down_blocks.{i}.attentions.{j}": f"input_blocks.{3 * i + 1 + j}.1" for i in range(3) for j in range(2)}
    up = {f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in range(1, 4) for j in range(3)}
    places = {**down, "mid_block.attentions.0": "middle_block.1", **up}
    weights = image.model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(0)
    file, added = {}, {}
    for theirs, ours in places.items():
        for attention in ("attn1", "attn2"):
            for projection in ("q", "k", "v", "out"):
                host = f"{ours}.transformer_blocks.0.{attention}.to_{projection}{'.0' * (projection == 'out')}.weight"
                rows, columns = weights[host].shape
                stem = f"{theirs}.transformer_blocks.0.{attention}.processor.to_{projection}_lora"
                down, up = (torch.randn(shape, generator=generator) / 8 for shape in ((4, columns), (rows, 4)))
                file |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
                added[host] = up @ down
    return file, added


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_domain_adapter_through_the_hosts_own_loader(ending: str, image: ModelPatcher, module: MotionModule,
                                                     run_node: Run, caplog: pytest.LogCaptureFixture) -> None:
    file, added = adapter_file(image)
    assert len(file) == 256
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"v3_sd15_adapter.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": file, "animatediff_config": "text"}, folder / name)
    else:
        save_file(file, folder / name)
    before = {key: tensor.clone() for key, tensor in image.model.diffusion_model.state_dict().items()}
    clips = {}
    for scale in (1.0, 0.0, 0.35, -1.0, 2.5):
        (adapted,) = run_node("LoraLoaderModelOnly", model=image, lora_name=name, strength_model=scale)
        clips[scale] = draw(apply(run_node, adapted, module), noise())
        comfy.model_management.load_models_gpu([adapted])
        for key, tensor in image.model.diffusion_model.state_dict().items():
            wanted = before[key] + scale * added[key] if key in added else before[key]
            assert torch.allclose(tensor, wanted, rtol=1e-5, atol=1e-6), (scale, key)
        comfy.model_management.unload_all_models()
    assert "not loaded" not in caplog.text
    assert torch.equal(clips[0.0], draw(apply(run_node, image, module), noise()))
    assert min(error(clips[scale], clips[0.0]) for scale in (1.0, 0.35, -1.0, 2.5)) > 1e-3


# --- stored types ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_stored_type_of_the_weights(dtype: torch.dtype, image: ModelPatcher, run_node: Run, watched: Watch) -> None:
    """A float32 model computes in float32 whatever the file stores: as with the same numbers written out wide."""
    spec = helpers_motion.motion_spec()
    weights = {name: t.to(dtype) for name, t in helpers_motion.motion_weights(spec).items()}
    wide = {name: t.float() for name, t in weights.items()}
    found, expected = (draw(apply(run_node, image, watched(manage(MotionFile(spec, file), "x"))), noise())
                       for file in (weights, wide))
    assert error(found, expected) < SAME


@pytest.mark.parametrize("variant", [V1, V2, SDXL_BETA], ids=lambda variant: variant.name)
def test_a_bfloat16_model_computes_in_its_own_type(variant: Variant, run_node: Run, watched: Watch) -> None:
    image, made = watched(tiny_host.sd15(dtype=torch.bfloat16)), watched(motion_module(variant=variant))
    wide = tiny_host.sd15()
    state = image.model.diffusion_model.state_dict()
    wide.model.diffusion_model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    watched(wide)
    types: set[torch.dtype] = set()

    def note(_: torch.nn.Module, args: tuple, out: Tensor) -> None:
        types.add(out.dtype)

    hook = image.model.diffusion_model.out.register_forward_hook(note)
    found = draw(apply(run_node, image, made, strength_per_frame=torch.rand(4, 16, 16) + 0.5), noise())
    hook.remove()
    assert types == {torch.bfloat16} and torch.isfinite(found).all()
    plain, moving = (draw(apply(run_node, model, made), noise()) for model in (image, wide))
    assert error(plain, moving) < 0.1


def test_weights_of_an_fp8_image_model(run_node: Run, watched: Watch) -> None:
    image = watched(tiny_host.sd15(dtype=torch.float8_e4m3fn, compute_dtype=torch.float32))
    for variant in (V1, V2):
        video = apply(run_node, image, watched(motion_module(variant=variant, dtype=torch.float8_e4m3fn)))
        assert torch.isfinite(draw(video, noise())).all()


def test_a_mixed_file_keeps_its_finest_type() -> None:
    spec = helpers_motion.motion_spec((32,), layers=1)
    weights = helpers_motion.motion_weights(spec)
    first = next(iter(weights))
    mixed = {n: t.to(torch.float8_e4m3fn) if re.search("to_[qkv]", n) or n == first else t for n, t in weights.items()}
    loaded = manage(MotionFile(spec, mixed), "mixed").patcher.model.state_dict()
    assert all(torch.equal(loaded[name].float(), mixed[name].float()) for name in mixed)
