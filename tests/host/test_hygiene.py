"""Whatever happens while a MODEL with motion is sampled, the image model and the host are what they were.

The fixtures compare tensors, modules and methods of the host's network after each test; `host_globals_unchanged` of
conftest.py compares every function of the host.
"""

from __future__ import annotations

import copy
import gc
import resource
from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, motion_lora, motion_module, relative_error
from latentmotion.host.unet import MotionSlot
from latentmotion.motion_modules.animatediff.spec import V1
from latentmotion.sampling.frame_values import frame_values
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

FRAMES = 3
Breaking = Callable[[], None]


def _cancel() -> None:
    """What the Cancel button does; the next layer of the host that runs raises."""
    comfy.model_management.interrupt_current_processing(True)


def _fail() -> None:
    raise RuntimeError("injected failure")


def _out_of_memory() -> None:
    raise comfy.model_management.OOM_EXCEPTION("injected: out of memory")


class _FailingAt:
    """Runs `breaking` when a layer deep inside the last temporal transformer is called, from the n-th time on."""

    def __init__(self, module: Any, breaking: Breaking, call: int) -> None:
        self.breaking, self.left, self.seen_slots = breaking, call, 0
        self.network: torch.nn.Module | None = None
        layer = list(module.patcher.model.transformers().values())[-1].transformer_blocks[0].ff
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left <= 0:
            self.seen_slots = sum(isinstance(module, MotionSlot) for module in self.network.modules())
            self.breaking()


ENDINGS = {
    "cancelled": (_cancel, comfy.model_management.InterruptProcessingException),
    "failed": (_fail, RuntimeError),
    "out of memory": (_out_of_memory, comfy.model_management.OOM_EXCEPTION),
}


@pytest.mark.parametrize("joint", [False, True], ids=["v2", "v1"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_run_that_ends_inside_a_temporal_transformer(ending: str, joint: bool, fragile_pair: Pair) -> None:
    """In the second step, with every slot in place, and with the norms of v1 replaced."""
    breaking, error = ENDINGS[ending]
    module = motion_module(seed=2, variant=V1) if joint else fragile_pair.module
    model = fragile_pair.video(module)
    expected = tiny_host.sample(model, FRAMES)
    trap = _FailingAt(module, breaking, call=2)
    trap.network = fragile_pair.plain.model.diffusion_model
    try:
        with pytest.raises(error):
            tiny_host.sample(model, FRAMES)
    finally:
        trap.handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert trap.seen_slots == len(module.spec.slots), "the run must have broken while the network was inflated"
    fragile_pair.assert_nothing_left()
    assert torch.equal(tiny_host.sample(model, FRAMES), expected)


def test_cancel_between_steps(fragile_pair: Pair) -> None:
    model, steps = fragile_pair.video(), []

    def callback(step: int, *_: Any) -> None:
        steps.append(step)
        _cancel()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny_host.sample(model, FRAMES, steps=4, callback=callback)
    assert steps == [0]


def test_clip_of_one_frame_is_refused_before_anything_is_touched(fragile_pair: Pair) -> None:
    with pytest.raises(ValueError, match="one frame only"):
        tiny_host.sample(fragile_pair.video(), 1)


def test_image_model_is_the_same_between_videos(pair: Pair) -> None:
    """Two models in turn, one with and one without motion: neither knows of the other."""
    video, v1 = pair.video(), pair.video(motion_module(seed=2, variant=V1))
    first = [tiny_host.sample(model, FRAMES) for model in (pair.plain, video, v1)]
    again = [tiny_host.sample(model, FRAMES) for model in (v1, video, pair.plain)]
    for a, b in zip(first, reversed(again), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_unloading_between_runs(pair: Pair) -> None:
    model = pair.video()
    first = tiny_host.sample(model, FRAMES)
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    assert torch.equal(tiny_host.sample(model, FRAMES), first)
    comfy.model_management.free_memory(1e30, torch.device("cpu"))
    assert torch.equal(tiny_host.sample(model, FRAMES), first)


def test_motion_module_is_the_hosts_to_load_and_unload(pair: Pair) -> None:
    tiny_host.sample(pair.video(), FRAMES)
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert pair.module.patcher.model in loaded and pair.plain.model in loaded
    assert pair.module.patcher.model_size() == sum(
        p.numel() * p.element_size() for p in pair.module.patcher.model.parameters()
    )


def test_switching_motion_loras_between_runs(pair: Pair) -> None:
    """One after another, two at once, and none again: the weights are restored exactly."""
    before = {name: tensor.clone() for name, tensor in pair.module.patcher.model.state_dict().items()}
    one, two = motion_lora(pair.module, 1, 0.5), motion_lora(pair.module, 2, 0.5)
    stacks = [pair.module, one, two, motion_lora(one, 2, 0.5), pair.module, one]
    clips = [tiny_host.sample(pair.video(module), FRAMES) for module in stacks]
    assert torch.equal(clips[0], clips[4]) and torch.equal(clips[1], clips[5])
    for a, b in ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3)):
        assert not torch.equal(clips[a], clips[b]), f"runs {a} and {b}"
    comfy.model_management.unload_all_models()
    after = pair.module.patcher.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_lora_of_no_strength_changes_nothing(pair: Pair) -> None:
    bare = tiny_host.sample(pair.video(), FRAMES)
    assert relative_error(tiny_host.sample(pair.video(motion_lora(pair.module, 1, 0.0)), FRAMES), bare) < 1e-6


def test_two_motion_modules_on_one_model(pair: Pair) -> None:
    """Each acts, in the order of the canvas, and the MODEL they were put on keeps the first only."""
    second = motion_module(seed=5)
    one, both, other = pair.video(), pair.video(second, base=pair.video()), pair.video(second)
    clips = [tiny_host.sample(model, FRAMES) for model in (one, both, other, one)]
    assert torch.equal(clips[0], clips[3])
    assert not torch.equal(clips[1], clips[0]) and not torch.equal(clips[1], clips[2])


def _tensors(value: Any, found: dict[int, Tensor] | None = None, seen: set[int] | None = None) -> dict[int, Tensor]:
    """Every tensor reachable from an object through containers and attributes, by id."""
    found = {} if found is None else found
    seen = set() if seen is None else seen
    if id(value) in seen:
        return found
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, torch.nn.Module):
        found.update({id(tensor): tensor for tensor in value.state_dict(keep_vars=True).values()})
    elif isinstance(value, dict):
        for item in value.values():
            _tensors(item, found, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _tensors(item, found, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        _tensors(vars(value), found, seen)
    return found


def test_clone_is_cheap(pair: Pair) -> None:
    model = pair.video(strength=frame_values(1.0, torch.rand(FRAMES, 8, 8)))
    before = _bytes_alive()
    clone = model.clone()
    assert _bytes_alive() - before < 1024, "a clone of a MODEL holds no tensor of its own"
    assert clone.model is model.model
    assert torch.equal(tiny_host.sample(clone, FRAMES), tiny_host.sample(model, FRAMES))


def test_options_are_copied_without_their_tensors(pair: Pair) -> None:
    """Also the options of a run under way, which hold the wrappers: packs and guiders deep-copy them."""
    model = pair.video(strength=frame_values(1.0, torch.rand(FRAMES, 8, 8)))
    options: list[dict] = [model.model_options]

    def note(executor: Callable, x: Tensor, t: Tensor, model_options: dict, *args: Any, **kw: Any) -> Tensor:
        options.append(model_options)
        return executor(x, t, model_options, *args, **kw)

    spied = model.clone()
    spied.add_wrapper_with_key("predict_noise", "note", note)
    tiny_host.sample(spied, FRAMES)
    assert len(options) == 3
    weights = set(_tensors(pair.module.patcher.model))
    assert weights & set(_tensors(options[1])), "the options of a run must lead to the weights, or nothing is proven"
    for original in options:
        new = _tensors(copy.deepcopy(original))
        known = _tensors(original)
        assert sum(tensor.nbytes for key, tensor in new.items() if key not in known) < 1024


def _bytes_alive() -> int:
    """Bytes of every tensor that Python can reach, storages counted once; a compiler's stand-ins hold none."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _alive(*kinds: type) -> list[int]:
    gc.collect()
    return [sum(isinstance(found, kind) for found in gc.get_objects()) for kind in kinds]


def _one_of_many_runs(pair: Pair, number: int) -> None:
    """A new MODEL each time; a LoRA, a failure, a cancel or an unload now and then."""
    module = motion_lora(pair.module, number % 3) if number % 2 else pair.module
    model = pair.video(module)
    breaking, error = list(ENDINGS.values())[number % 3]
    if number % 4 == 3:
        trap = _FailingAt(module, breaking, call=1)
        trap.network = pair.plain.model.diffusion_model
        with pytest.raises(error):
            tiny_host.sample(model, 2, steps=1)
        trap.handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    else:
        tiny_host.sample(model, 2, steps=1)
    if number % 5 == 4:
        comfy.model_management.unload_all_models()


def test_twenty_runs_leave_nothing_behind(pair: Pair) -> None:
    counted, resident = [], []
    for number in range(25):
        _one_of_many_runs(pair, number)
        if number % 5 == 4:
            counted.append((_bytes_alive(), *_alive(Tensor, ModelPatcher, MotionSlot)))
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert counted[1:] == counted[:1] * 4, "bytes, tensors, patchers and slots alive after 5, 10, 15, 20 and 25 runs"
    assert resident[-1] - resident[0] < 50 * 1024, "peak resident memory grew by more than 50 MB over 20 runs"
