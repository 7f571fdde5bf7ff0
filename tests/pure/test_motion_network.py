"""The temporal transformer against an independent float64 computation, and what must hold for any weights."""

from __future__ import annotations

import pytest
import reference_motion as reference
import torch
from latentmotion.motion_modules.animatediff.network import MotionModel, TemporalTransformer
from latentmotion.motion_modules.animatediff.spec import V3, MotionSpec
from latentmotion.motion_modules.call import MotionCall
from latentmotion.motion_modules.norm import joint_group_norm
from latentmotion.sampling.frame_values import frame_values
from torch import Tensor, nn

SLOT = "down_blocks.0.motion_modules.0"
EXACT = 1e-5
SAME = 1e-6  # two orders of summation of the same float32 sums
HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def transformer(channels: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> TemporalTransformer:
    made = TemporalTransformer(MotionSpec(V3, ((SLOT, channels),), 32), channels, nn)
    made.load_state_dict(reference.random_weights({k: v.shape for k, v in made.state_dict().items()}, seed))
    return made.to(dtype).requires_grad_(False)


def images(channels: int, frames: int = 5, clips: int = 2, h: int = 3, w: int = 2, seed: int = 1) -> Tensor:
    """Feature maps with an offset of their own in every frame, so that joint and separate statistics differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(clips * frames, channels, h, w, generator=generator)
    return x + torch.randn(clips * frames, 1, 1, 1, generator=generator)


def call(frames: int = 5, positions: Tensor | None = None, **settings: object) -> MotionCall:
    positions = torch.arange(frames, dtype=torch.float32) if positions is None else positions
    return MotionCall(frames=frames, positions=positions, **settings)


@torch.no_grad()
def run(made: TemporalTransformer, x: Tensor, joint: bool = False, frames: int = 5, **settings: object) -> Tensor:
    return made(x, call(frames, **settings), joint)


@pytest.mark.parametrize("joint", [False, True], ids=["per frame", "joint"])
@pytest.mark.parametrize("channels", [32, 320, 640, 1280])
def test_equals_the_reference(channels: int, joint: bool) -> None:
    made, x = transformer(channels), images(channels)
    expected = reference.temporal_transformer(x, made.state_dict(), 5, joint_norm=joint)
    assert reference.relative_error(run(made, x, joint), expected) < EXACT
    motion = run(made, x, joint).double() - x.double()
    assert reference.relative_error(motion, expected - x.double()) < EXACT
    assert reference.relative_error(x, expected) > 0.1, "the weights are too small for this test to mean anything"


def test_joint_and_separate_statistics_differ() -> None:
    made, x = transformer(64), images(64)
    assert reference.relative_error(run(made, x, True), run(made, x, False)) > 1e-2


@pytest.mark.parametrize("frames", [1, 2, 16, 32])
def test_any_number_of_frames(frames: int) -> None:
    """One frame too: attention over one token is not an identity."""
    made, x = transformer(64), images(64, frames)
    expected = reference.temporal_transformer(x, made.state_dict(), frames)
    assert reference.relative_error(run(made, x, frames=frames), expected) < EXACT


@pytest.mark.parametrize("slab", [1, 10_000, 50_000, 123_457, 2**30])
@pytest.mark.parametrize("joint", [False, True])
def test_slabs_equal_the_whole(slab: int, joint: bool) -> None:
    """Numbers and maps alike: a map must be cut with the positions it belongs to."""
    made, x = transformer(64), images(64, h=5, w=7)
    maps = torch.rand(10, 1, 5, 7)
    for settings in ({}, {"strength": maps, "scale": 2.0 * maps}):
        whole = run(made, x, joint, slab_bytes=2**40, **settings)
        assert reference.relative_error(run(made, x, joint, slab_bytes=slab, **settings), whole) < SAME


@pytest.mark.parametrize("joint", [False, True])
def test_with_gradient_equals_without(joint: bool) -> None:
    made, x, maps = transformer(64), images(64), torch.rand(10, 1, 3, 2)
    for settings in ({}, {"strength": 0.3, "scale": 1.5}, {"strength": maps, "scale": maps}):
        with torch.enable_grad():
            trained = made(x.clone().requires_grad_(), call(**settings), joint)
        assert trained.requires_grad
        assert reference.relative_error(trained.detach(), run(made, x, joint, **settings)) < SAME


def test_gradient_equals_the_reference() -> None:
    made, x = transformer(32), images(32)
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    (made(ours, call()) * probe).sum().backward()
    (reference.temporal_transformer(theirs, made.state_dict(), 5) * probe.double()).sum().backward()
    assert reference.relative_error(ours.grad, theirs.grad) < EXACT


def test_every_weight_gets_a_gradient() -> None:
    made = transformer(32).requires_grad_(True)
    made(images(32), call()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.parametrize("joint", [False, True])
def test_clips_do_not_leak_into_each_other(joint: bool) -> None:
    made, x = transformer(64), images(64, clips=3)
    both = run(made, x, joint)
    for clip in range(3):
        part = slice(5 * clip, 5 * clip + 5)
        assert reference.relative_error(both[part], run(made, x[part], joint)) < SAME
    other = x.clone()
    other[:5] = 100.0 * torch.rand_like(other[:5])
    assert torch.equal(run(made, other, joint)[5:], both[5:])


@pytest.mark.parametrize("joint", [False, True])
def test_every_frame_reaches_every_frame(joint: bool) -> None:
    made, x = transformer(64), images(64, clips=1)
    before = run(made, x, joint)
    for frame in range(5):
        changed = x.clone()
        changed[frame] += torch.randn_like(changed[frame])
        differs = (run(made, changed, joint) - before).flatten(1).norm(dim=1)
        assert (differs > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_output_projection_is_the_identity(dtype: torch.dtype) -> None:
    """As every motion module is before training: bit for bit, whatever the settings."""
    made, x = transformer(64, dtype=dtype), images(64).to(dtype)
    made.proj_out.weight.zero_()
    made.proj_out.bias.zero_()
    for joint in (False, True):
        assert torch.equal(run(made, x, joint), x)
        assert torch.equal(run(made, x, joint, strength=0.7, scale=torch.rand(10, 1, 3, 2)), x)
        assert torch.equal(made(x.clone(), call(), joint), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_input_is_left_alone(layout: torch.memory_format) -> None:
    made, x = transformer(64), images(64, h=4, w=4).contiguous(memory_format=layout)
    kept = x.clone()
    out = run(made, x, strength=0.5)
    assert torch.equal(x, kept) and out.data_ptr() != x.data_ptr()
    expected = reference.temporal_transformer(x.contiguous(), made.state_dict(), 5, strength=0.5)
    assert out.shape == x.shape and reference.relative_error(out, expected) < EXACT


def test_a_view_may_come_in() -> None:
    made, x = transformer(64), images(64, clips=4, h=6, w=6)
    view = x[:10, :, 1:5, ::2]
    expected = reference.temporal_transformer(view.contiguous(), made.state_dict(), 5)
    assert reference.relative_error(run(made, view), expected) < EXACT


@pytest.mark.parametrize(("strength", "scale"), [(0.5, 1.0), (1.0, 0.5), (2.0, 1.5), (0.0, 1.0), (1.0, 0.0)])
def test_numbers_follow_the_formula(strength: float, scale: float) -> None:
    made, x = transformer(64), images(64)
    expected = reference.temporal_transformer(x, made.state_dict(), 5, strength=strength, key_scale=scale)
    assert reference.relative_error(run(made, x, strength=strength, scale=scale), expected) < EXACT


def test_lists_follow_the_frame() -> None:
    made, x = transformer(64), images(64)
    strength, scale = [0.0, 0.25, 1.0, 2.0, 0.5], [1.0, 1.3, 0.2, 0.9, 2.0]
    found = run(made, x, strength=frame_values(2.0, strength).at(range(5), 2),
                scale=frame_values(0.5, scale).at(range(5), 2))
    column = [torch.tensor(v * 2).view(-1, 1, 1, 1).expand(-1, 1, 3, 2) for v in (strength, scale)]
    expected = reference.temporal_transformer(x, made.state_dict(), 5, strength=column[0] * 2.0,
                                              key_scale=column[1] * 0.5)
    assert reference.relative_error(found, expected) < EXACT
    assert torch.equal(found[0], x[0]) and torch.equal(found[5], x[5])


@pytest.mark.parametrize("grid", [(1, 1), (4, 6), (8, 12), (3, 5)])
def test_masks_are_brought_to_the_grid(grid: tuple[int, int]) -> None:
    made, x = transformer(64), images(64, h=4, w=6)
    masks = torch.rand(5, *grid, generator=torch.Generator().manual_seed(3))
    found = run(made, x, strength=frame_values(1.0, masks).at(range(5), 2),
                scale=frame_values(1.0, 2 * masks).at(range(5), 2))
    maps = reference.resize(masks[:, None].repeat(2, 1, 1, 1), 4, 6)
    expected = reference.temporal_transformer(x, made.state_dict(), 5, strength=maps, key_scale=2 * maps)
    assert reference.relative_error(found, expected) < EXACT


def test_positions_may_be_stretched() -> None:
    made, x = transformer(64), images(64, frames=9)
    positions = torch.linspace(0, 3, 9)
    expected = reference.temporal_transformer(x, made.state_dict(), 9, positions=positions)
    assert reference.relative_error(run(made, x, frames=9, positions=positions), expected) < EXACT
    assert reference.relative_error(run(made, x, frames=9), expected) > 1e-2


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype, joint: bool) -> None:
    made, x = transformer(320, dtype=dtype), images(320).to(dtype)
    expected = reference.temporal_transformer(x, made.state_dict(), 5, joint_norm=joint)
    found = run(made, x, joint)
    assert found.dtype is dtype and reference.relative_error(found, expected) < HALF[dtype]
    maps = torch.rand(10, 1, 3, 2)
    assert run(made, x, joint, strength=maps, scale=maps).dtype is dtype
    assert made(x, call(strength=maps, scale=maps), joint).dtype is dtype


def test_joint_statistics_survive_large_offsets_in_half_precision() -> None:
    """A mean of 100 and a spread of 1: squares summed in half precision would lose the variance."""
    norm = nn.GroupNorm(32, 64, eps=1e-6).requires_grad_(False)
    x = (torch.randn(4, 64, 8, 8, generator=torch.Generator().manual_seed(0)) + 100).half()
    expected = reference.group_norm(x, norm.weight, norm.bias, 4, 1e-6)
    assert reference.relative_error(joint_group_norm(norm, x, 4), expected) < 1e-3


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_joint_norm_equals_the_reference(frames: int) -> None:
    norm = nn.GroupNorm(32, 96, eps=1e-5).requires_grad_(False)
    norm.load_state_dict(reference.random_weights({"weight": (96,), "bias": (96,)}, 2))
    x = images(96, frames=4, clips=1, h=5, w=3)
    expected = reference.group_norm(x, norm.weight, norm.bias, frames, 1e-5)
    assert reference.relative_error(joint_group_norm(norm, x, frames), expected) < SAME


def test_any_attention_may_be_handed_in() -> None:
    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v

    made, x = transformer(64), images(64)
    assert reference.relative_error(run(made, x, attention=explicit), run(made, x)) < SAME
    average = run(made, x, attention=lambda q, k, v: v.mean(-2, keepdim=True).expand_as(q))
    assert reference.relative_error(average, reference.temporal_transformer(x, made.state_dict(), 5,
                                                                            key_scale=0.0)) < EXACT


def test_same_input_same_output() -> None:
    made, x = transformer(64), images(64)
    assert torch.equal(run(made, x, slab_bytes=9_000), run(made, x, slab_bytes=9_000))


def test_names_and_sizes_are_the_published_ones() -> None:
    slots = tuple((f"{side}.{i}.motion_modules.{j}", c) for side, widths, per in
                  (("down_blocks", (320, 640, 1280, 1280), 2), ("up_blocks", (1280, 1280, 640, 320), 3))
                  for i, c in enumerate(widths) for j in range(per))
    v3 = MotionModel(MotionSpec(V3, slots, 32), nn, device="meta").state_dict()
    v2 = MotionModel(MotionSpec(V3, (*slots, ("mid_block.motion_modules.0", 1280)), 32), nn, device="meta").state_dict()
    assert (len(v3), sum(t.numel() for t in v3.values())) == (520, 417_137_600)
    assert (len(v2), sum(t.numel() for t in v2.values())) == (546, 453_209_280)
    assert "up_blocks.3.motion_modules.2.temporal_transformer.transformer_blocks.0.ff.net.0.proj.weight" in v3


DIFFUSERS_NAMES = {"attention_blocks.0.": "attn1.", "attention_blocks.1.": "attn2.", "norms.0.": "norm1.",
                   "norms.1.": "norm2.", "ff_norm.": "norm3."}


@pytest.mark.parametrize("channels", [64, 320])
def test_equals_diffusers_where_diffusers_equals_the_authors(channels: int) -> None:
    """diffusers takes the motion norm over all frames for every variant, as the authors do for SDXL beta only.

    For the other variants the same comparison holds once a clip's frames are handed over one by one (f = 1).
    """
    unet_motion = pytest.importorskip("diffusers.models.unets.unet_motion_model")
    made, x = transformer(channels), images(channels)
    theirs = unet_motion.AnimateDiffTransformer3D(
        num_attention_heads=8, attention_head_dim=channels // 8, in_channels=channels, norm_num_groups=32,
        activation_fn="geglu", positional_embeddings="sinusoidal", num_positional_embeddings=32,
        double_self_attention=True, attention_bias=False,
    ).requires_grad_(False)
    renamed = made.state_dict()
    for ours, name in DIFFUSERS_NAMES.items():
        renamed = {key.replace(ours, name): tensor for key, tensor in renamed.items()}
    missing = theirs.load_state_dict(renamed, strict=False)
    assert missing.missing_keys == ["transformer_blocks.0.pos_embed.pe"] and not missing.unexpected_keys
    assert reference.relative_error(run(made, x, joint=True), theirs(x, num_frames=5)) < EXACT
    assert reference.relative_error(run(made, x, frames=1), theirs(x, num_frames=1)) < EXACT
