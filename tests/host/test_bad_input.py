"""Each mistake gets its own sentence on the node that can mend it, and the host goes on as if nothing had been."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.context_windows
import comfy.model_management
import comfy.supported_models
import folder_paths
import helpers_motion
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import motion_module
from latentmotion.demo import config as demo_config
from latentmotion.host import paths
from latentmotion.host.motion import MotionModule
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.spec import MotionSpec
from latentmotion.motion_modules.errors import CheckpointError, ClipError, LatentMotionError, ModelMismatchError
from motion_runs import APPLY, DEFAULTS, Run, apply
from safetensors.torch import save_file
from torch import Tensor

LOAD, LORA = "LatentMotionLoadMotionModule", "LatentMotionLoadMotionLora"
WIDTHS = (32, 64)


def module_file(seed: int = 0, length: int = 16) -> dict[str, Tensor]:
    """A whole small motion module in the published layout."""
    spec = helpers_motion.motion_spec(WIDTHS)
    tables = {f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe":
              torch.zeros(1, length, c) for slot, c in spec.slots for i in range(2)}
    return helpers_motion.motion_weights(spec, seed) | tables


def lora_file() -> dict[str, Tensor]:
    stem = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q"
    return {f"{stem}_lora.down.weight": torch.ones(2, 32), f"{stem}_lora.up.weight": torch.ones(32, 2)}


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


@pytest.fixture
def folders(pack_nodes: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """Empty folders of motion modules and MotionLoRAs, the only ones the host knows during the test."""
    found = {}
    for name in ("animatediff_models", "animatediff_motion_lora"):
        (tmp_path / name).mkdir()
        extensions = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], extensions))
        monkeypatch.delitem(folder_paths.filename_list_cache, name, raising=False)
        found[name] = tmp_path / name
    return found


@pytest.fixture
def models(folders: dict[str, Path]) -> Path:
    return folders["animatediff_models"]


@pytest.fixture
def loras(folders: dict[str, Path]) -> Path:
    return folders["animatediff_motion_lora"]


@pytest.fixture(scope="module")
def image() -> ModelPatcher:
    return tiny_host.sd15(**helpers_motion.SMALL)


@pytest.fixture(scope="module")
def module() -> MotionModule:
    return motion_module(widths=helpers_motion.SMALL_WIDTHS, layers=1, positions=8)


# --- files -------------------------------------------------------------------------------------------------------

def spoiled(file: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "up_blocks.0.motion_modules.2.temporal_transformer.proj_in.weight"
    return file | {name: torch.full_like(file[name], float("nan"))}


CHOSEN: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "MotionLoRA": (lora_file, "is a MotionLoRA, which changes a motion module.*put this file into Load MotionLoRA"),
    "image checkpoint": (lambda: named("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"),
                         "is a whole image checkpoint. Load it with Load Checkpoint"),
    "image LoRA": (lambda: named("lora_unet_x.lora_up.weight"), "is a LoRA for an image model.*Load LoRA node"),
    "VAE": (lambda: named("decoder.up.0.block.0.conv1.weight"), "is a VAE. Use the Load VAE node"),
    "NaN": (lambda: spoiled(module_file()), r"up_blocks\.0\.motion_modules\.2.*proj_in\.weight holds NaN or infinite"),
    "half a module": (lambda: dict(list(module_file().items())[:200]), "cut short or mixed|tensors of a motion module"),
    "nothing": (lambda: {}, "holds no tensors at all"),
}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", CHOSEN)
def test_the_wrong_file_chosen_as_motion_module(kind: str, ending: str, models: Path, run_node: Run) -> None:
    make, sentence = CHOSEN[kind]
    name = f"choice.{ending}"
    save_file(make(), models / name) if ending == "safetensors" else torch.save({"state_dict": make()}, models / name)
    with pytest.raises(CheckpointError, match=f"^{name}:? .*({sentence})"):
        run_node(LOAD, motion_module=name)


def test_truncated_safetensors(models: Path, run_node: Run) -> None:
    save_file(module_file(), models / "mm.safetensors")
    whole = (models / "mm.safetensors").read_bytes()
    (models / "mm.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"^mm.safetensors cannot be read as safetensors .*download it again"):
        run_node(LOAD, motion_module="mm.safetensors")


def test_truncated_pickle(models: Path, run_node: Run) -> None:
    torch.save(module_file(), models / "mm.ckpt")
    whole = (models / "mm.ckpt").read_bytes()
    (models / "mm.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"^mm.ckpt cannot be read .*cut short or damaged"):
        run_node(LOAD, motion_module="mm.ckpt")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("node", [LOAD, LORA])
def test_a_pickle_with_code_is_refused_and_not_run(node: str, folders: dict[str, Path], module: MotionModule,
                                                   run_node: Run, tmp_path: Path) -> None:
    for folder in folders.values():
        torch.save({"state_dict": module_file(), "callbacks": Evil(tmp_path / "owned")}, folder / "evil.ckpt")
    inputs = {LOAD: {"motion_module": "evil.ckpt"},
              LORA: {"motion_module": module, "motion_lora": "evil.ckpt", "strength": 1.0}}[node]
    with pytest.raises(CheckpointError, match="^evil.ckpt is a pickle that holds more than tensors, so it is not open"):
        run_node(node, **inputs)
    assert not (tmp_path / "owned").exists()


def test_a_motion_module_chosen_as_motion_lora(loras: Path, module: MotionModule, run_node: Run) -> None:
    save_file(module_file(), loras / "mm.safetensors")
    with pytest.raises(CheckpointError, match="^mm.safetensors is a motion module, not a MotionLoRA. .*Load Motion"):
        run_node(LORA, motion_module=module, motion_lora="mm.safetensors", strength=1.0)


def test_a_motion_lora_for_another_family(loras: Path, module: MotionModule, run_node: Run) -> None:
    wide = {name: torch.ones(2, 320) if "down.weight" in name else torch.ones(320, 2) for name in lora_file()}
    save_file(wide, loras / "zoom.safetensors")
    with pytest.raises(ModelMismatchError, match=r"^zoom.safetensors does not fit this AnimateDiff v2 motion module .*"
                                                 r"shape \(320, 320\), which has shape \(32, 32\) there"):
        run_node(LORA, motion_module=module, motion_lora="zoom.safetensors", strength=1.0)


# --- missing files -----------------------------------------------------------------------------------------------

def validated(pack_nodes: dict, node: str, **inputs: Any) -> bool | str:
    return pack_nodes[node].validate_inputs(**inputs)


def test_a_missing_motion_module_names_those_that_would_fit(models: Path, pack_nodes: dict) -> None:
    save_file(module_file(), models / "mm_sd_v15_v3.safetensors")
    save_file({f"module.{n}": t for n, t in module_file().items()}, models / "trained.safetensors")
    torch.save(module_file(), models / "toy.ckpt")
    save_file(lora_file(), models / "v2_lora_ZoomIn.safetensors")
    save_file(named("model.diffusion_model.x"), models / "image.safetensors")
    (models / "damaged.safetensors").write_bytes(b"\x00" * 30)
    said = validated(pack_nodes, LOAD, motion_module="mm_sd_v15_v2.ckpt")
    assert said.startswith("The motion module mm_sd_v15_v2.ckpt is not in your animatediff_models folder. Of the files "
                           "you have, these would fit: mm_sd_v15_v3.safetensors, ")
    assert "trained.safetensors" in said and "toy.ckpt" in said and said.endswith(".")
    assert not any(other in said for other in ("ZoomIn", "image", "damaged"))
    assert validated(pack_nodes, LOAD, motion_module="toy.ckpt") is True


def test_the_demos_files_are_not_recommended(models: Path, pack_nodes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "DEMO_WEIGHTS", models)
    save_file(module_file(), models / "toy.safetensors")
    said = validated(pack_nodes, LOAD, motion_module="mm_sd_v15_v2.ckpt")
    assert "mm_sd_v15_v2.ckpt is not in your animatediff_models folder, and neither is any other but the demo's" in said


def test_a_missing_motion_lora_names_those_that_would_fit(loras: Path, pack_nodes: dict) -> None:
    save_file(lora_file(), loras / "zoom_in.safetensors")
    save_file(module_file(), loras / "zoom_module.safetensors")
    said = validated(pack_nodes, LORA, motion_lora="v2_lora_ZoomIn.ckpt")
    assert said == ("The MotionLoRA v2_lora_ZoomIn.ckpt is not in your animatediff_motion_lora folder. Of the files "
                    "you have, these would fit: zoom_in.safetensors.")


def test_no_file_at_all(folders: dict[str, Path], pack_nodes: dict) -> None:
    said = validated(pack_nodes, LOAD, motion_module="mm.ckpt")
    assert said.startswith("The motion module mm.ckpt is not in your animatediff_models folder, and neither is any")
    assert "Put one into " in said and "refresh the page" in said
    assert "MotionLoRA zoom.ckpt is not in" in validated(pack_nodes, LORA, motion_lora="zoom.ckpt")


def test_a_file_deleted_between_validation_and_run(models: Path, module: MotionModule, run_node: Run) -> None:
    save_file(module_file(), models / "here.safetensors")
    with pytest.raises(CheckpointError, match="The motion module gone.ckpt is not in .*would fit: here.safetensors"):
        run_node(LOAD, motion_module="gone.ckpt")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..\\x.ckpt", "", "a\0b.ckpt"])
def test_names_cannot_leave_the_folder(name: str, models: Path, pack_nodes: dict, run_node: Run) -> None:
    assert "is not in your animatediff_models folder" in str(validated(pack_nodes, LOAD, motion_module=name))
    with pytest.raises(CheckpointError, match="is not in your animatediff_models folder"):
        run_node(LOAD, motion_module=name)


# --- models that do not fit --------------------------------------------------------------------------------------

def full_size(config_class: type, unet_config: dict) -> ModelPatcher:
    """An image MODEL of the real widths whose tensors take no memory."""
    config = config_class(unet_config)
    config.set_inference_dtype(torch.float32, None)
    meta = torch.device("meta")
    return ModelPatcher(config.get_model({}, "", device=meta), load_device=meta, offload_device=meta)


def full_module(levels: tuple[int, ...], variant: specs.Variant, name: str) -> MotionModule:
    layout = helpers_motion.motion_spec(levels)
    slots = tuple(slot for slot in layout.slots if not slot[0].startswith("mid_block"))
    return MotionModule(name, MotionSpec(variant, slots, 32), None)


def test_sdxl_module_on_sd15_and_the_reverse(run_node: Run) -> None:
    sd15 = full_size(comfy.supported_models.SD15, tiny_host.sd15_config(320, 768))
    sdxl = full_size(comfy.supported_models.SDXL, tiny_host.sdxl_config(320, 2048))
    beta, v3 = (full_module(specs.SDXL_LEVELS, specs.SDXL_BETA, "mm_sdxl_v10_beta.ckpt"),
                full_module(specs.SD15_LEVELS, specs.V3, "v3_sd15_mm.ckpt"))
    said = ("^mm_sdxl_v10_beta.ckpt is a motion module for SDXL, and this MODEL is SD1.x / SD2.x. Choose a motion "
            "module for SD1.x / SD2.x, or load a checkpoint of SDXL")
    with pytest.raises(ModelMismatchError, match=said):
        apply(run_node, sd15, beta)
    said = "^v3_sd15_mm.ckpt is a motion module for SD1.x / SD2.x, and this MODEL is SDXL."
    with pytest.raises(ModelMismatchError, match=said):
        apply(run_node, sdxl, v3)


def test_the_demos_module_on_sd15_is_sent_to_the_demo(run_node: Run) -> None:
    config = demo_config.UNET
    widths = tuple(config["model_channels"] * times for times in config["channel_mult"])
    toy = motion_module(widths=widths, layers=config["num_res_blocks"][0])
    said = "is a motion module for the demo's image model, and this MODEL is SD1.x / SD2.x. .* use Load Demo Models."
    with pytest.raises(ModelMismatchError, match=said):
        apply(run_node, full_size(comfy.supported_models.SD15, tiny_host.sd15_config(320, 768)), toy)


@pytest.mark.parametrize("layout", [{"widths": (32, 64, 128)}, {"widths": (64, 128)}, {"widths": (32,)},
                                    {"widths": (32, 64), "layers": 2}, {"widths": (32, 64, 64), "layers": 1}])
def test_other_widths_and_depths(layout: dict, image: ModelPatcher, run_node: Run) -> None:
    with pytest.raises(ModelMismatchError, match="is a motion module for (a UNet of widths|the demo).*this MODEL is a "
                                                 "UNet of widths 32, 64 with 1 layer each. Choose"):
        apply(run_node, image, motion_module(**layout))


def test_a_model_that_is_no_unet(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    flow = image.clone()
    flow.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    with pytest.raises(ModelMismatchError, match="this MODEL is a Linear, which has no place for it. Use an SD1.x or"):
        apply(run_node, flow, module)


def test_a_model_that_makes_video_by_itself(run_node: Run) -> None:
    """Stable Video Diffusion has the widths of SD1.5, and time layers of its own."""
    config = tiny_host.sd15_config(
        320, 1024, use_temporal_resblock=True, use_temporal_attention=True, num_heads=-1, num_head_channels=64,
        video_kernel_size=[3, 1, 1], merge_strategy="learned_with_images", merge_factor=0.0,
        use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=768)
    svd = full_size(comfy.supported_models.SVD_img2vid, config)
    with pytest.raises(ModelMismatchError, match="this MODEL makes video by itself .Stable Video Diffusion."):
        apply(run_node, svd, full_module(specs.SD15_LEVELS, specs.V3, "v3_sd15_mm.ckpt"))


# --- through the executor ----------------------------------------------------------------------------------------

def graph(module_name: str, drawn: int = 2, **apply_inputs: Any) -> dict[str, dict]:
    return {
        "1": {"class_type": LOAD, "inputs": {"motion_module": module_name}},
        "2": {"class_type": "TestImageModel", "inputs": {}},
        "3": {"class_type": APPLY, "inputs": DEFAULTS | {"model": ["2", 0], "motion_module": ["1", 0]} | apply_inputs},
        "4": {"class_type": "TestSink", "inputs": {"model": ["3", 0], "frames": drawn}},
    }


@pytest.fixture
def test_nodes(core_nodes: dict, image: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of the small MODEL, and an output node that draws some frames with what it gets."""

    class TestImageModel:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {}}

        def run(self) -> tuple:
            return (image,)

    class TestSink:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"model": ("MODEL",), "frames": ("INT", {})}}

        def run(self, model: ModelPatcher, frames: int) -> dict:
            return {"ui": {"mean": [float(tiny_host.sample(model, frames, steps=1).mean())]}}

    monkeypatch.setitem(core_nodes, "TestImageModel", TestImageModel)
    monkeypatch.setitem(core_nodes, "TestSink", TestSink)


def fault(result: dict) -> dict[str, Any]:
    return next(data for event, data in result["messages"] if event == "execution_error")


def test_the_server_stays_healthy(test_nodes: None, models: Path, run_graph: Callable, pack_nodes: dict) -> None:
    """One executor, one mistake after another, a good run before and after: same picture, the right node marked."""
    spec = helpers_motion.motion_spec(helpers_motion.SMALL_WIDTHS, 1)
    save_file(helpers_motion.motion_weights(spec), models / "good.safetensors")
    save_file(module_file(), models / "wide.safetensors")
    for name, kind in (("lora", "MotionLoRA"), ("image", "image checkpoint"), ("nan", "NaN")):
        save_file(CHOSEN[kind][0](), models / f"{name}.safetensors")
    torch.save({"x": Evil(models / "owned")}, models / "evil.ckpt")
    (models / "short.safetensors").write_bytes((models / "good.safetensors").read_bytes()[:5000])
    first = run_graph(graph("good.safetensors"))
    assert first["success"]

    for node, sentence, mistake in (
        ("1", "is a MotionLoRA", graph("lora.safetensors")),
        ("1", "is a whole image checkpoint", graph("image.safetensors")),
        ("1", "holds NaN or infinite", graph("nan.safetensors")),
        ("1", "cannot be read as safetensors", graph("short.safetensors")),
        ("1", "more than tensors", graph("evil.ckpt")),
        ("3", "widths 32, 64 with 2 layers each, and this MODEL is a UNet of widths 32, 64 with 1 layer each. ",
         graph("wide.safetensors")),
        ("4", "3 frames per clip do not divide", graph("good.safetensors", frames=3)),
        ("4", "The latent holds no frames", graph("good.safetensors", drawn=0)),
        ("4", "frame positions", graph("good.safetensors", drawn=80)),
    ):
        result = run_graph(mistake)
        assert not result["success"]
        assert fault(result)["node_id"] == node and sentence in fault(result)["exception_message"]
    with pytest.raises(ValueError, match="absent.ckpt is not in your animatediff_models folder. Of the files you have"):
        run_graph(graph("absent.ckpt"))
    with pytest.raises(ValueError, match="is not below end_percent"):
        run_graph(graph("good.safetensors", start_percent=0.7, end_percent=0.3))

    again = run_graph(graph("good.safetensors", strength=0.999))
    assert again["success"]
    last = run_graph(graph("good.safetensors"))
    assert last["success"] and last["outputs"]["4"] == first["outputs"]["4"] != again["outputs"]["4"]


def test_percentages_may_come_over_a_link(test_nodes: None, models: Path, run_graph: Callable) -> None:
    """Validation cannot see a linked number; it must not trip over it."""
    spec = helpers_motion.motion_spec(helpers_motion.SMALL_WIDTHS, 1)
    save_file(helpers_motion.motion_weights(spec), models / "good.safetensors")
    linked = graph("good.safetensors", start_percent=["5", 0])
    linked["5"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.25}}
    assert run_graph(linked)["success"]


def test_every_error_is_of_the_packs_own_kind() -> None:
    assert all(issubclass(kind, LatentMotionError) for kind in (CheckpointError, ClipError, ModelMismatchError))
    assert issubclass(LatentMotionError, ValueError)
