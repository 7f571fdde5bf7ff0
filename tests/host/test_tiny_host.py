"""The builders of the other host tests are themselves sound: the layouts are real and every layer matters."""

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import pytest
import tiny_host
import torch


def test_sd15_layout_is_the_published_one() -> None:
    network = tiny_host.sd15().model.diffusion_model
    assert (len(network.input_blocks), len(network.output_blocks)) == (12, 12)
    assert [len(block) for block in network.output_blocks] == [1, 1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 2]


def test_sdxl_layout_is_the_published_one() -> None:
    network = tiny_host.sdxl().model.diffusion_model
    assert (len(network.input_blocks), len(network.output_blocks)) == (9, 9)


@pytest.mark.parametrize("build", [tiny_host.sd15, tiny_host.sdxl])
def test_same_seed_same_clip(build: Callable) -> None:
    first, again, other = (tiny_host.sample(build(seed), frames=2) for seed in (0, 0, 1))
    assert torch.isfinite(first).all() and first.std() > 0.01
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_prompt_reaches_the_network() -> None:
    model = tiny_host.sd15()
    one, two = (tiny_host.sample(model, 2, positive=tiny_host.conditioning(model, seed)) for seed in (1, 3))
    assert not torch.allclose(one, two)


def test_denoise_once_is_the_same_twice() -> None:
    model, x = tiny_host.sd15(), torch.randn(2, 4, 8, 8)
    assert torch.equal(tiny_host.denoise_once(model, x), tiny_host.denoise_once(model, x))


def test_controlnet_changes_the_clip(run_node: Callable) -> None:
    model = tiny_host.sd15()
    hint = torch.rand(2, 64, 64, 3)
    plain, control = tiny_host.conditioning(model, 1), tiny_host.controlnet()
    (positive,) = run_node("ControlNetApply", conditioning=plain, control_net=control, image=hint, strength=1.0)
    assert not torch.allclose(tiny_host.sample(model, 2), tiny_host.sample(model, 2, positive=positive))


def test_sampling_leaves_the_weights_alone() -> None:
    model = tiny_host.sd15()
    before, modules = tiny_host.weights(model), tiny_host.modules_of(model)
    tiny_host.sample(model)
    comfy.model_management.unload_all_models()
    tiny_host.assert_same_weights(model, before)
    assert tiny_host.modules_of(model) == modules


def test_a_changed_weight_is_noticed() -> None:
    model = tiny_host.sd15()
    before = tiny_host.weights(model)
    model.model.diffusion_model.out[2].bias[0] += 1
    with pytest.raises(AssertionError, match=r"1 tensors.*out\.2\.bias"):
        tiny_host.assert_same_weights(model, before)


def test_a_replaced_global_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny_host.global_functions()
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x)
    monkeypatch.setattr(comfy.samplers, "sampling_function", lambda *a: None)
    changed = tiny_host.changed_functions(before, tiny_host.global_functions())
    assert "comfy.samplers.sampling_function" in changed
    assert any(name.endswith("GroupNorm.forward") for name in changed)


def test_graph_runs_in_the_executor(run_graph: Callable) -> None:
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 2, "color": 255}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    result = run_graph(prompt)
    assert result["success"] and len(result["outputs"]["2"]["images"]) == 2
    with pytest.raises(ValueError, match="required_input_missing"):
        run_graph({"2": {"class_type": "PreviewImage", "inputs": {}}})
