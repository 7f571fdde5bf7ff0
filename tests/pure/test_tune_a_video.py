"""Tune-A-Video without a host: files that are refused with a sentence, work in pieces, weights to begin with."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from latentmotion.motion_modules.call import MotionCall
from latentmotion.motion_modules.errors import CheckpointError
from latentmotion.motion_modules.tune_a_video.attention import Reach, attend
from latentmotion.motion_modules.tune_a_video.checkpoint import BASE, Base, identify, portable, read_tuned
from latentmotion.motion_modules.tune_a_video.network import TemporalLayer, initial_weights, trained_shapes
from torch import Tensor, nn
from torch.nn import functional

SLOTS = tuple((f"{block}.transformer_blocks.0", c) for block, c in (
    ("down_blocks.0.attentions.0", 16), ("mid_block.attentions.0", 32), ("up_blocks.1.attentions.0", 16)))  # fmt: skip
FRAMES = 3


def whole() -> dict[str, Tensor]:
    """The names a whole UNet has besides T-Attn, as far as reading looks at them."""
    queries = {key: torch.randn(shape) for key, shape in trained_shapes(SLOTS).items() if "attn_temp" not in key}
    return initial_weights(SLOTS, 0) | queries | {"conv_in.weight": torch.zeros(2, 4, 3, 3)}


def changes() -> tuple[dict[str, Tensor], dict[str, str]]:
    queries = {key: torch.ones(shape) for key, shape in trained_shapes(SLOTS).items() if "attn_temp" not in key}
    return portable(initial_weights(SLOTS, 0), queries, Base("v1-5.safetensors", (0.25,) * 12))


def test_a_file_of_differences_comes_back() -> None:
    tensors, about = changes()
    assert len(tensors) == 7 * len(SLOTS) == len(trained_shapes(SLOTS))
    file = read_tuned(tensors, about, "jeep")
    assert file.slots == SLOTS and file.base == Base("v1-5.safetensors", (0.25,) * 12)
    assert {key: tuple(t.shape) for key, t in (file.temporal | file.changes).items() if "norm_temp" not in key} == dict(
        trained_shapes(SLOTS)
    )
    norms = {key: t for key, t in file.temporal.items() if "norm_temp" in key}
    assert len(norms) == 6 and all(bool((t == key.endswith("weight")).all()) for key, t in norms.items())
    odd = initial_weights(SLOTS, 0) | {f"{SLOTS[0][0]}.norm_temp.bias": torch.full((16,), 0.5)}
    assert len(portable(odd, {}, file.base)[0]) == 5 * len(SLOTS) + 1, "norms that say something are kept"


def test_a_whole_unet_is_read_out_of_what_it_is_wrapped_in() -> None:
    names = {f"unet.{key}": tensor for key, tensor in whole().items()} | {"vae.conv_in.weight": torch.zeros(2)}
    file = read_tuned({"state_dict": names}, {}, "jeep", {"attention_head_dim": [4, 8]})
    assert file.base is None and not file.changes and set(file.weights) | set(file.temporal) == set(whole())
    assert file.heads == (4, 8, 4)
    assert read_tuned(whole(), {}, "jeep", {"attention_head_dim": 8}).heads == (8, 8, 8)


def without(part: str) -> Callable[[dict], dict]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


@pytest.mark.parametrize(("change", "sentence"), [
    (without("attn1.to_q"), "lacks 3 tensors of a tuned video model"),
    (without("mid_block.attentions.0.transformer_blocks.0.attn_temp.to_k"), "lacks 1 tensors"),
    (without("attn_temp"), "has no attention over frames|holds no tuned"),
    (lambda t: {}, "holds no tensors"),
    (lambda t: t | {"down_blocks.0.temp_attentions.0.proj_in.weight": torch.zeros(2, 2)}, "ModelScope"),
    (lambda t: {"model.diffusion_model.out.2.weight": torch.zeros(2)}, "whole image checkpoint"),
    (lambda t: {"down_blocks.0.motion_modules.0.x": torch.zeros(2)}, "is a motion module. Load it with Load Motion M"),
    (lambda t: {"motion_modules.0.to_q_lora.down.weight": torch.zeros(2)}, "is a MotionLoRA. Load it with Load Motion"),
    (lambda t: {"lora_unet_x.lora_down.weight": torch.zeros(2)}, "is a LoRA"),
    (lambda t: {"some.weight": torch.zeros(2)}, "holds no tuned video model"),
    (lambda t: {k: v[:1] if "to_out.0.bias" in k else v for k, v in t.items()}, "has shape"),
    (lambda t: {k: v / 0 if "attn2.to_q" in k else v for k, v in t.items()}, "NaN or infinite"),
    (lambda t: {k: v.int() if "attn_temp.to_v" in k else v for k, v in t.items()}, "must be floating point"),
])  # fmt: skip
def test_files_that_are_something_else(change: Callable, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=f"^jeep.*({sentence})"):
        read_tuned(change(whole()), {}, "jeep")


@pytest.mark.parametrize("about", [
    {}, {BASE: "{"}, {BASE: "[]"}, {BASE: json.dumps({"name": "x", "numbers": [1], "dtype": "x"})},
    {BASE: json.dumps({"name": "x", "numbers": "abc", "dtype": "float32"})},
])  # fmt: skip
def test_differences_to_nothing_in_particular(about: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="does not say to which one"):
        read_tuned(changes()[0], about, "jeep")


def test_surplus_and_odd_metadata_of_differences() -> None:
    tensors, about = changes()
    with pytest.raises(CheckpointError, match="has unknown 1 tensors"):
        read_tuned(tensors | {"conv_in.weight": torch.zeros(2)}, about, "jeep")
    short = {BASE: json.dumps({"name": "x", "numbers": [1.0], "dtype": "float32"})}
    with pytest.raises(CheckpointError, match="does not fit its layers"):
        read_tuned(tensors, short, "jeep")
    with pytest.raises(CheckpointError, match="attention_head_dim that fits no UNet"):
        read_tuned(whole(), {}, "jeep", {"attention_head_dim": [1, "x"]})


def test_load_motion_module_says_what_it_is() -> None:
    with pytest.raises(CheckpointError, match="Load it with Load Tuned Video Model"):
        read_motion_module(whole(), "jeep")


def test_an_image_model_is_known_in_every_format_and_by_nobody_else() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"{slot}.{part}.weight": 0.05 * torch.randn(c, c, generator=generator) for slot, c in SLOTS
               for part in ("attn1.to_k", "attn2.to_v")}  # fmt: skip

    def known_as(dtype: torch.dtype, factor: float = 1.0) -> Base:
        return identify(SLOTS, lambda name: (weights[name] * factor).to(dtype).float().to(dtype), "x")

    exact = known_as(torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert exact.is_same(known_as(dtype)) and known_as(dtype).is_same(exact)
    assert not exact.is_same(known_as(torch.float32, 1.001)) and not exact.is_same(known_as(torch.float16, 1.004))


def test_pieces_change_nothing_and_the_start_is_a_constant() -> None:
    torch.manual_seed(0)
    layer = TemporalLayer(16, 4, nn)
    x = torch.randn(2 * FRAMES, 10, 16)
    call = MotionCall(FRAMES, torch.arange(FRAMES))
    with torch.no_grad():
        expected = layer(x, call)
        for slab in (1, 4096, 10**9):
            made = layer(x, MotionCall(FRAMES, torch.arange(FRAMES), slab_bytes=slab))
            assert torch.allclose(made, expected, atol=1e-6)
        half = layer(x, MotionCall(FRAMES, torch.arange(FRAMES), strength=0.5))
        assert torch.allclose(half - x, (expected - x) / 2, atol=1e-6)
    assert torch.allclose(layer(x, call), expected, atol=1e-6), "with gradients it is the same"
    start = initial_weights(((SLOTS[0][0], 16),), 0)
    layer.load_state_dict({key.removeprefix(SLOTS[0][0] + "."): t for key, t in start.items()})
    added = layer(x, call) - x
    bias = layer.attn_temp.to_out[0].bias
    assert bias.abs().max() <= 16**-0.5 and bias.abs().max() > 0.1, "the bias is not zeroed, as in the release"
    assert torch.allclose(added, bias.expand_as(added), atol=1e-6)
    assert all(torch.equal(t, initial_weights(((SLOTS[0][0], 16),), 0)[key]) for key, t in start.items())


@pytest.mark.parametrize("reach", Reach)
@pytest.mark.parametrize("tiles", [1, 2])
def test_pictures_in_tiles_attend_within_their_place(reach: Reach, tiles: int) -> None:
    """Other packs cut pictures into tiles; a tile then sees the same tile of other frames."""
    attention = functional.scaled_dot_product_attention
    q, k, v = (torch.randn(2, FRAMES, tiles, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    made = attend(reach, FRAMES, 2 * FRAMES, *(t.flatten(0, 2) for t in (q, k, v)), attention)
    seen = {Reach.SPARSE: lambda i: [0, max(i - 1, 0)], Reach.OWN: lambda i: [i],
            Reach.CAUSAL: lambda i: list(range(i + 1)), Reach.FULL: lambda i: list(range(FRAMES))}[reach]  # fmt: skip
    for clip in range(2):
        for i in range(FRAMES):
            for tile in range(tiles):
                keys, values = (torch.cat([t[clip, j, tile] for j in seen(i)]) for t in (k, v))
                expected = attention(q[clip, i, tile][None], keys[None], values[None])[0]
                found = made.unflatten(0, (2, FRAMES, tiles))[clip, i, tile]
                assert torch.allclose(found, expected, atol=1e-6)
