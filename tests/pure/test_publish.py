"""Motion modules are written so that they are read back as what they are, and new ones change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.publish import new_spec, published, still_module
from latentmotion.motion_modules.animatediff.spec import (
    ANIMATE_LCM,
    CONVOLUTION,
    HOTSHOT_XL,
    SDXL_BETA,
    SDXL_LEVELS,
    V1,
    V2,
    V3,
    MotionSpec,
    Variant,
)
from latentmotion.motion_modules.call import MotionCall
from latentmotion.motion_modules.errors import CheckpointError, ModelMismatchError


@pytest.mark.parametrize("variant", [V1, V2, V3, HOTSHOT_XL, ANIMATE_LCM, CONVOLUTION], ids=lambda kind: kind.name)
def test_a_file_is_read_back_as_what_it_is(variant: Variant) -> None:
    spec = new_spec((32, 64), 2, variant in (V2, ANIMATE_LCM), variant is CONVOLUTION)
    spec = replace(spec, variant=variant, positions=variant.positions)
    weights = {name: torch.randn(t.shape) for name, t in MotionModel(spec).state_dict().items()}
    file = read_motion_module(published(spec, weights), "x")
    assert (file.spec.variant, file.spec.positions, set(file.spec.slots)) == (variant, spec.positions, set(spec.slots))
    assert all(torch.equal(file.weights[name], tensor) for name, tensor in weights.items())


def test_new_layouts_are_those_of_the_published_modules() -> None:
    assert new_spec((320, 640, 1280, 1280), 2, False).variant is V3
    assert new_spec((320, 640, 1280, 1280), 2, True).variant is V2
    assert new_spec(SDXL_LEVELS, 2, False).variant is SDXL_BETA
    counts = {mid: sum(p.numel() for p in _meta(new_spec((320, 640, 1280, 1280), 2, mid)).parameters())
              for mid in (False, True)}  # fmt: skip
    assert counts == {False: 417_137_600, True: 453_209_280}  # reference: 417.1376 M and 453.2093 M
    with pytest.raises(ModelMismatchError, match="multiple of 32"):
        new_spec((30, 60), 1, False)


def test_the_ablation_has_the_size_of_the_transformer() -> None:
    whole, convolving = (_meta(new_spec((320, 640, 1280, 1280), 2, False, convolves)) for convolves in (False, True))
    counts = [sum(p.numel() for p in network.parameters()) for network in (whole, convolving)]
    assert counts[1] == pytest.approx(counts[0], rel=0.001)


def test_convolutions_reach_eight_frames_either_way() -> None:
    network = MotionModel(new_spec((32, 64), 1, False, convolves=True))
    transformer = next(iter(network.transformers().values()))
    frames, x = 12, torch.randn(12, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0] += 1.0 + x[0].roll(1, 0)
    call = MotionCall(frames, torch.arange(frames, dtype=torch.float32))
    with torch.no_grad():
        differs = (transformer(x, call) - transformer(changed, call)).flatten(1).norm(dim=1)
        assert torch.equal(transformer(x, call), transformer(x, replace(call, scale=2.0)))
    assert (differs[:9] > 0).all() and (differs[9:] == 0).all()


def test_attentions_and_convolutions_in_one_file_are_no_motion_module() -> None:
    parts = [published(spec, MotionModel(spec).state_dict()) for spec in
             (new_spec((32, 64), 1, False, convolves) for convolves in (True, False))]  # fmt: skip
    with pytest.raises(CheckpointError, match="has unknown 72 tensors"):
        read_motion_module(parts[0] | parts[1], "mixed")


def _meta(spec: MotionSpec) -> MotionModel:
    return MotionModel(spec, device="meta")


def test_a_new_module_changes_nothing_and_is_the_same_again() -> None:
    spec = new_spec((32, 64), 1, True)
    state = torch.random.get_rng_state()
    network = still_module(spec, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, other = still_module(spec, 3).state_dict(), still_module(spec, 4).state_dict()
    weights = network.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    x = torch.randn(3, 64, 4, 4)
    call = MotionCall(3, torch.arange(3.0))
    assert torch.equal(network.transformers()["mid_block.motion_modules.0"](x, call), x)
