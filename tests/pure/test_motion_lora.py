"""MotionLoRA files: every dialect of names gives the same changes of the same weights."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.lora import MotionLora, parts_for, read_motion_lora
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.spec import MotionSpec
from latentmotion.motion_modules.errors import CheckpointError, ModelMismatchError
from torch import Tensor, nn

RANK = 4
LEVELS = (32, 64, 32, 32)
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def spec(levels: tuple[int, ...] = LEVELS, mid: bool = True) -> MotionSpec:
    down = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(levels) for j in range(2)]
    up = [(f"up_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(levels[::-1]) for j in range(3)]
    middle = [("mid_block.motion_modules.0", levels[-1])] if mid else []
    return MotionSpec(specs.V2 if mid else specs.V3, (*down, *middle, *up), 32)


def shapes(layout: MotionSpec) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in MotionModel(layout, nn, device="meta").state_dict().items()}


@functools.cache
def _published(levels: tuple[int, ...] = LEVELS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    file = {}
    for slot, c in spec(levels).slots:
        for block in range(2):
            for projection in PROJECTIONS:
                stem = (f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.{block}."
                        f"processor.{projection}_lora")
                file[f"{stem}.down.weight"] = torch.randn(RANK, c, generator=generator)
                file[f"{stem}.up.weight"] = torch.randn(c, RANK, generator=generator)
    return file


def published(levels: tuple[int, ...] = LEVELS) -> dict[str, Tensor]:
    """The key set of the eight released MotionLoRAs."""
    return dict(_published(levels))


def expected(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a weight -> what is added to it at strength 1, worked out from the published names alone."""
    deltas = {}
    for name, down in file.items():
        if name.endswith("_lora.down.weight"):
            target = name.replace("processor.", "").removesuffix("_lora.down.weight")
            target += ".0.weight" if target.endswith("to_out") else ".weight"
            deltas[target] = file[name.replace(".down.", ".up.")] @ down
    return deltas


def deltas(lora: MotionLora) -> dict[str, Tensor]:
    return {name: part.up @ part.down * (1.0 if part.alpha is None else part.alpha / part.down.shape[0])
            for name, part in lora.parts.items()}


def renamed(file: Mapping[str, Any], *pairs: tuple[str, str], front: str = "") -> dict[str, Any]:
    out = {}
    for name, tensor in file.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[front + name] = tensor
    return out


DIFFUSERS = (("temporal_transformer.", ""), ("attention_blocks.0.", "attn1."), ("attention_blocks.1.", "attn2."))
PEFT = (*DIFFUSERS, ("processor.", ""), ("to_out_lora", "to_out.0_lora"), ("_lora.down", ".lora_A"), ("_lora.up",
                                                                                                  ".lora_B"))
DIALECTS: dict[str, Callable[[dict[str, Tensor]], Mapping[str, Any]]] = {
    "published": lambda f: f,
    "nested as published": lambda f: {"state_dict": f, "epoch": 1, "animatediff_config": "text"},
    "training dump": lambda f: {"state_dict": renamed(f, front="module.")},
    "MotionDirector: to_out.0": lambda f: renamed(f, ("processor.to_out_lora", "processor.to_out.0_lora")),
    "MotionDirector: to_out.processor.0": lambda f: renamed(f, ("processor.to_out_lora", "to_out.processor.0_lora")),
    "diffusers": lambda f: renamed(f, *DIFFUSERS, front="unet."),
    "diffusers without prefix": lambda f: renamed(f, *DIFFUSERS),
    "diffusers by PEFT": lambda f: renamed(f, *PEFT, front="unet."),
    "PEFT as saved": lambda f: renamed(f, *PEFT, (".lora_A", ".lora_A.default"), (".lora_B", ".lora_B.default"),
                                       front="base_model.model."),
    "lora.down": lambda f: renamed(f, ("processor.", ""), ("_lora.", ".lora."), ("to_out.", "to_out.0.")),
    "lora_down": lambda f: renamed(f, ("processor.", ""), ("_lora.", ".lora_"), ("to_out.", "to_out.0.")),
    "Hotshot names": lambda f: renamed(f, ("motion_modules", "temporal_attentions"), ("temporal_transformer.", "")),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_changes(dialect: str) -> None:
    file = published()
    assert len(file) == 336, "the released files hold 168 pairs"
    found = deltas(read_motion_lora(DIALECTS[dialect](file), "zoom.ckpt"))
    wanted = expected(file)
    assert found.keys() == wanted.keys() and len(found) == 168
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found.keys() <= shapes(spec()).keys()


@pytest.mark.parametrize("dialect", ["published", "diffusers", "lora_down"])
def test_alpha_scales_by_rank(dialect: str) -> None:
    file = DIALECTS[dialect](published())
    downs = [name for name in file if "down.weight" in name]
    alphas = {}
    for i, name in enumerate(downs):
        stem = name.removesuffix("down.weight").rstrip("._")
        # the three ways to write it: `to_q.alpha`, `to_q_lora.alpha` and, where there is a dot, `to_q.lora.alpha`
        stem = stem.removesuffix("_lora").removesuffix(".lora") if i % 2 else stem
        alphas[f"{stem}.alpha"] = torch.tensor(float(i % 7 + 1)).to(torch.float16 if i % 3 else torch.float32)
    found = deltas(read_motion_lora(file | alphas, "zoom"))
    wanted = expected(published())
    assert found.keys() == wanted.keys()
    for i, name in enumerate(wanted):
        assert torch.allclose(found[name], wanted[name] * ((i % 7 + 1) / RANK)), name


def test_feed_forward_pairs_of_motion_director() -> None:
    stem = "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.ff.net"
    extra = {f"{stem}.0.processor.proj_lora.down.weight": torch.randn(2, 32),
             f"{stem}.0.processor.proj_lora.up.weight": torch.randn(256, 2),
             f"{stem}.2.lora.down.weight": torch.randn(2, 128), f"{stem}.2.lora.up.weight": torch.randn(32, 2)}
    lora = read_motion_lora(published() | extra, "director")
    fitting = parts_for(lora, spec(), shapes(spec()))
    assert len(fitting) == 170 and fitting[f"{stem}.0.proj.weight"].up.shape == (256, 2)
    assert f"{stem}.2.weight" in fitting and lora.rank == RANK


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_type_is_kept(dtype: torch.dtype) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {name: t.to(dtype) for name, t in published().items()}}, buffer)
    buffer.seek(0)
    lora = read_motion_lora(torch.load(buffer, weights_only=True), "zoom")
    assert all(part.up.dtype is dtype and part.down.dtype is dtype for part in lora.parts.values())


def test_mid_block_is_left_out_where_the_module_has_none() -> None:
    lora, without = read_motion_lora(published(), "zoom"), spec(mid=False)
    fitting = parts_for(lora, without, shapes(without))
    assert len(fitting) == 160 and not any(name.startswith("mid_block") for name in fitting)
    assert len(parts_for(lora, spec(), shapes(spec()))) == 168


def test_a_lora_without_mid_block_fits_a_module_with_one() -> None:
    lora = read_motion_lora({n: t for n, t in published().items() if "mid_block" not in n}, "zoom")
    assert len(parts_for(lora, spec(), shapes(spec()))) == 160


def test_a_lora_of_the_mid_block_alone() -> None:
    lora = read_motion_lora({n: t for n, t in published().items() if "mid_block" in n}, "zoom")
    without = spec(mid=False)
    with pytest.raises(ModelMismatchError, match="zoom changes the mid block only, which this AnimateDiff v3 motion"):
        parts_for(lora, without, shapes(without))


@pytest.mark.parametrize(("made_for", "module"), [((320, 640), (320, 640, 1280)), ((32, 64, 32), (64, 64, 32)),
                                                  ((32, 64, 32, 32), (32, 64, 32))])
def test_another_family_gets_a_sentence(made_for: tuple[int, ...], module: tuple[int, ...]) -> None:
    lora, other = read_motion_lora(published(made_for), "v2_lora_ZoomIn.ckpt"), spec(module)
    with pytest.raises(ModelMismatchError, match=r"^v2_lora_ZoomIn.ckpt does not fit this AnimateDiff v2 .*"
                                                 r"Choose a MotionLoRA made for "):
        parts_for(lora, other, shapes(other))


STEM = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora"
DOWN, UP = f"{STEM}.down.weight", f"{STEM}.up.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (lambda f: f.update({UP: torch.full((32, RANK), float("nan"))}), r"to_q\.weight holds NaN or infinite"),
    "infinity": (lambda f: f.update({DOWN: torch.full((RANK, 32), float("inf"))}), "to_q.weight holds NaN or inf"),
    "half a pair": (lambda f: f.pop(UP), "to_q.weight has only its down half"),
    "the other half": (lambda f: f.pop(DOWN), "to_q.weight has only its up half"),
    "two ranks": (lambda f: f.update({UP: torch.zeros(32, 5)}), r"do not fit each other \(\(32, 5\) and \(4, 32\)\)"),
    "no rank": (lambda f: f.update({UP: torch.zeros(32, 0), DOWN: torch.zeros(0, 32)}), "do not fit each other"),
    "a vector": (lambda f: f.update({UP: torch.zeros(32)}), "do not fit each other"),
    "a number": (lambda f: f.update({DOWN: torch.zeros(())}), "do not fit each other"),
    "a convolution": (lambda f: f.update({UP: torch.zeros(32, RANK, 1, 1)}), "do not fit each other"),
    "whole numbers": (lambda f: f.update({UP: torch.zeros(32, RANK, dtype=torch.int32)}), "holds torch.int32 numbers"),
    "alpha NaN": (lambda f: f.update({f"{STEM}.alpha": torch.tensor(float("nan"))}), "alpha is not one finite number"),
    "alpha of two": (lambda f: f.update({f"{STEM}.alpha": torch.ones(2)}), "alpha is not one finite number"),
    "alpha of none": (lambda f: f.update({f"{STEM}.alpha": torch.ones(0)}), "alpha is not one finite number"),
    "alpha of nothing": (lambda f: f.update({STEM.replace("to_q_lora", "to_z.alpha"): torch.ones(())}),
                         "has an alpha but no change"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_loras_say_what_is_wrong(damage: str) -> None:
    change, sentence = DAMAGED[damage]
    file = published()
    change(file)
    with pytest.raises(CheckpointError, match=f"^zoom.ckpt: .*{sentence}"):
        read_motion_lora(file, "zoom.ckpt")


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


OTHERS = {
    "motion module": (named("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
                      "is a motion module, not a MotionLoRA. Load it with Load Motion Module"),
    "motion module nested": ({"state_dict": named("module.mid_block.motion_modules.0.proj_in.bias")},
                             "is a motion module"),
    "domain adapter": (named("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"),
                       "is a LoRA for an image model"),
    "image LoRA": (named("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"), "is a LoRA for an image model"),
    "image checkpoint": (named("model.diffusion_model.out.2.weight"), "is a whole image checkpoint"),
    "VAE": (named("decoder.up.0.upsample.conv.weight"), "is not a MotionLoRA: none of its 1 tensors"),
    "nothing": ({}, "holds no tensors at all"),
    "no tensors": ({"state_dict": {"a": 1}}, "holds no tensors at all"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_for_what_they_are(kind: str) -> None:
    payload, sentence = OTHERS[kind]
    with pytest.raises(CheckpointError, match=f"^choice {sentence}"):
        read_motion_lora(payload, "choice")
