"""Whatever happens while a MODEL with motion is sampled, the image model and the host are what they were.

The fixtures compare tensors, modules and methods of the host's network after each test; `host_globals_unchanged` of
conftest.py compares every function of the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_features import FEATURES, FRAMES, STEPS, Cramped, Shrinking, windowed, with_image_lora
from helpers_memory import MOST_GROWTH, bytes_alive, level, resident_bytes
from helpers_motion import SMALL, Pair, motion_lora, motion_module, relative_error
from helpers_restored import Watch, restored
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.unet import JointNorm, MotionSlot
from latentmotion.motion_modules.animatediff.spec import V1
from latentmotion.sampling.frame_values import frame_values
from latentmotion.sampling.windows import WindowPlan
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

Breaking = Callable[[], None]
Run = Callable[[Pair, Callable], None]


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
def test_run_that_ends_inside_a_temporal_transformer(
    ending: str, joint: bool, fragile_pair: Pair, watched: Watch
) -> None:
    """In the second step, with every slot in place, and with the norms of v1 replaced."""
    breaking, error = ENDINGS[ending]
    module = watched(motion_module(seed=2, variant=V1)) if joint else fragile_pair.module
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


def test_image_model_is_the_same_between_videos(pair: Pair, watched: Watch) -> None:
    """Two models in turn, one with and one without motion: neither knows of the other."""
    video, v1 = pair.video(), pair.video(watched(motion_module(seed=2, variant=V1)))
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


def test_two_motion_modules_on_one_model(pair: Pair, watched: Watch) -> None:
    """Each acts, in the order of the canvas, and the MODEL they were put on keeps the first only."""
    second = watched(motion_module(seed=5))
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
    before = bytes_alive()
    clone = model.clone()
    assert bytes_alive() - before < 1024, "a clone of a MODEL holds no tensor of its own"
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


def _run_of_feature(name: str) -> Run:
    def run(pair: Pair, run_node: Callable) -> None:
        model, options = FEATURES[name](pair.video(), run_node)
        tiny_host.sample(model, FRAMES, **{"steps": STEPS} | options)

    return run


def _run_of(video: Callable[[Pair], ModelPatcher], frames: int = FRAMES, **options: Any) -> Run:
    return lambda pair, run_node: tiny_host.sample(video(pair), frames, **{"steps": 1} | options)


def _run_that_ends(ending: str) -> Run:
    """Inside a temporal transformer, with every layer of ours among the host's."""

    def run(pair: Pair, run_node: Callable) -> None:
        breaking, error = ENDINGS[ending]
        trap = _FailingAt(pair.module, breaking, call=1)
        trap.network = pair.plain.model.diffusion_model
        with pytest.raises(error):
            tiny_host.sample(pair.video(), FRAMES, steps=1)
        trap.handle.remove()
        comfy.model_management.interrupt_current_processing(False)
        assert trap.seen_slots == len(pair.module.spec.slots)

    return run


def _loaded_in_part(kind: type[ModelPatcher]) -> Run:
    """With patches on both models, which the host applies layer by layer."""

    def run(pair: Pair, run_node: Callable) -> None:
        image, module = with_image_lora(pair.plain, run_node)[0], motion_lora(pair.module)
        for patcher in (image, module.patcher):
            patcher.__class__ = kind
        tiny_host.sample(pair.video(module, base=image), FRAMES, steps=1)
        assert pair.plain.model.model_lowvram and pair.module.patcher.model.model_lowvram

    return run


def _low_precision(weights: torch.dtype) -> Run:
    """Models of their own, which go with the run."""

    def run(pair: Pair, run_node: Callable) -> None:
        image = tiny_host.sd15(dtype=weights, compute_dtype=torch.float32)
        tiny_host.sample(pair.video(motion_module(dtype=weights), base=image), FRAMES, steps=1)

    return run


def _hosts_windows(pair: Pair, run_node: Callable) -> None:
    tiny_host.sample(windowed(pair.video(), run_node), 6, steps=1)


def _sliding_context(pair: Pair) -> ModelPatcher:
    return apply_context(pair.video(), SlidingContext(WindowPlan(length=4, overlap=2)))


SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm")
RUNS: dict[str, Run] = {
    **{name: _run_of_feature(name) for name in FEATURES},
    **{name: _run_of(Pair.video, steps=3, sampler=name) for name in SAMPLERS},
    **{name: _run_that_ends(name) for name in ENDINGS},
    "the host's windows": _hosts_windows,
    "sliding context": _run_of(_sliding_context, frames=6),
    "strength per frame": _run_of(lambda pair: pair.video(strength=frame_values(1.0, torch.rand(FRAMES, 8, 8)))),
    "MotionLoRA": _run_of(lambda pair: pair.video(motion_lora(pair.module, 1))),
    "two MotionLoRAs": _run_of(lambda pair: pair.video(motion_lora(motion_lora(pair.module, 1), 2, 0.5))),
    "v1": _run_of(lambda pair: pair.video(motion_module(seed=2, variant=V1))),
    "two modules": _run_of(lambda pair: pair.video(motion_module(seed=5), base=pair.video())),
    "no motion": _run_of(lambda pair: pair.plain),
    "little memory": _loaded_in_part(Cramped),
    "memory taken back": _loaded_in_part(Shrinking),
    "float8": _low_precision(torch.float8_e4m3fn),
    "bfloat16": _low_precision(torch.bfloat16),
}  # fmt: skip


def test_twenty_runs_leave_nothing_behind(pair: Pair, run_node: Callable) -> None:
    """Every kind of run three times, many more than twenty in a row: what one loaded left to the next, and unloaded."""
    for run in RUNS.values():
        run(pair, run_node)
    before, resident = level(), resident_bytes()
    for name, run in RUNS.items():
        run(pair, run_node)
        pair.assert_restored()
        assert level() == before, f"alive after {name}, and before"
    for run in RUNS.values():
        run(pair, run_node)
    assert level() == before
    assert resident_bytes() - resident < MOST_GROWTH, f"resident memory grew over {2 * len(RUNS)} runs"


def _first(model: torch.nn.Module) -> torch.nn.Module:
    return model.diffusion_model.input_blocks[0][0]


def _leave_slot(model: torch.nn.Module) -> None:
    model.diffusion_model.middle_block.add_module("left", MotionSlot(torch.nn.Identity(), None))


def _leave_norm(model: torch.nn.Module) -> None:
    model.diffusion_model.out[0] = JointNorm(model.diffusion_model.out[0], 2)


def _change_one_bit(model: torch.nn.Module) -> None:
    _first(model).weight.view(torch.int32).flatten()[0] ^= 1


def _leave_patch(model: torch.nn.Module) -> None:
    _first(model).weight_function = [torch.neg]


OFFENCES: dict[str, tuple[Callable[[torch.nn.Module], Any], str]] = {
    "slot": (_leave_slot, "layers of the pack"),
    "norm": (_leave_norm, "layers of the pack"),
    "another layer": (lambda model: setattr(model.diffusion_model, "out", copy.deepcopy(model.diffusion_model.out)),
                      "other objects"),
    "a layer more": (lambda model: model.diffusion_model.out.append(torch.nn.Identity()), "came, went"),
    "forward": (lambda model: setattr(_first(model), "forward", _first(model).forward), "forward"),
    "method": (lambda model: setattr(model, "memory_required", model.memory_required), "methods or hooks"),
    "hook": (lambda model: _first(model).register_forward_hook(print), "methods or hooks"),
    "patch": (_leave_patch, "still patches"),
    "one bit": (_change_one_bit, "1 tensors changed"),
    "type": (lambda model: _first(model).half(), "tensors changed"),
    "buffer": (lambda model: model.model_sampling.sigmas.mul_(2), "1 tensors changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFENCES)
def test_what_is_left_behind_is_noticed(name: str) -> None:
    image = tiny_host.sd15(**SMALL)
    offence, message = OFFENCES[name]
    with pytest.raises(AssertionError, match=message), restored(image):
        offence(image.model)


def test_a_changed_motion_module_is_noticed() -> None:
    module = motion_module(widths=(32,), layers=1)
    with pytest.raises(AssertionError, match="1 tensors changed"), restored(module):
        next(iter(module.patcher.model.parameters())).view(-1)[0] += 1


def test_what_stays_in_memory_is_measured() -> None:
    """Memory that is given back counts no more, which the peak of a process would not tell."""
    before, resident = level(), resident_bytes()
    kept = [torch.zeros(1000), bytearray(b"1" * 2 * MOST_GROWTH)]
    assert level()["bytes"] - before["bytes"] == kept[0].nbytes
    assert resident_bytes() - resident > MOST_GROWTH
    kept.clear()
    assert level() == before
    assert resident_bytes() - resident < MOST_GROWTH
