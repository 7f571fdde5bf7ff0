"""Every setting of Apply Motion Module and Load MotionLoRA does what it says, inside the host's own sampling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import helpers_motion
import pytest
import reference_motion as reference
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from helpers_motion import inflate, motion_module
from helpers_restored import Watch
from latentmotion.host.motion import MotionModule
from latentmotion.motion_modules.animatediff.spec import (
    ANIMATE_LCM,
    HOTSHOT_XL,
    SDXL_BETA,
    V1,
    V2,
    V3,
    Schedule,
    Variant,
)
from latentmotion.motion_modules.errors import ModelMismatchError
from latentmotion.sampling.frame_values import frame_values
from motion_runs import SAME, Run, apply, draw, error, noise
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]


# --- noise schedules ---------------------------------------------------------------------------------------------

# sigma of the first, the 501st and the last training step, as in the table of the authors' settings
TABLE = {("root", 0.012): (0.02917, 1.618, 14.615), ("beta", 0.012): (0.02917, 2.285, 25.146),
         ("root", 0.020): (0.02917, 2.218, 65.929)}
AS_TRAINED = {V1: ("beta", 0.012), V2: ("beta", 0.012), V3: ("beta", 0.012), SDXL_BETA: ("root", 0.020),
              HOTSHOT_XL: ("root", 0.012), ANIMATE_LCM: ("beta", 0.012)}
BY_NAME = {Schedule.SCALED_LINEAR: ("root", 0.012), Schedule.LINEAR: ("beta", 0.012),
           Schedule.SCALED_LINEAR_SDXL: ("root", 0.020)}


def sampling_of(model: ModelPatcher) -> Any:
    return model.get_model_object("model_sampling")


def assert_schedule(model: ModelPatcher, kind: tuple[str, float]) -> None:
    sigmas, (low, middle, high) = sampling_of(model).sigmas, TABLE[kind]
    assert error(sigmas, reference.sigmas(*kind)) < SAME
    assert (float(sigmas[0]), float(sigmas[500]), float(sigmas[-1])) == pytest.approx((low, middle, high), rel=3e-4)


@pytest.mark.parametrize("variant", AS_TRAINED, ids=lambda variant: variant.name)
def test_schedule_is_the_one_the_variant_was_trained_with(variant: Variant, image: ModelPatcher, run_node: Run,
                                                          watched: Watch) -> None:
    before = sampling_of(image)
    assert_schedule(apply(run_node, image, watched(motion_module(variant=variant))), AS_TRAINED[variant])
    assert sampling_of(image) is before and image.model.model_sampling is before
    assert_schedule(image, ("root", 0.012))


@pytest.mark.parametrize("schedule", Schedule)
def test_schedule_may_be_chosen(schedule: Schedule, image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    assert_schedule(apply(run_node, image, module, noise_schedule=schedule.value), BY_NAME[schedule])


def test_models_own_schedule_is_left_alone(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    model = apply(run_node, image, module, noise_schedule="image model's own")
    assert sampling_of(model) is image.model.model_sampling


@pytest.mark.parametrize(("sampling", "cls"), [("v_prediction", "V_PREDICTION"), ("lcm", "LCM")])
def test_what_the_network_predicts_is_kept(sampling: str, cls: str, image: ModelPatcher, module: MotionModule,
                                           run_node: Run) -> None:
    (changed,) = run_node("ModelSamplingDiscrete", model=image, sampling=sampling, zsnr=False)
    found = sampling_of(apply(run_node, changed, module))
    assert type(found).__mro__[1:] == type(sampling_of(changed)).__mro__[1:]
    assert any(base.__name__ == cls for base in type(found).__mro__)
    assert float(found.sigma_max) == pytest.approx(25.146, rel=1e-3 if sampling == "lcm" else 3e-4)


def test_zero_terminal_snr_is_kept(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    (changed,) = run_node("ModelSamplingDiscrete", model=image, sampling="v_prediction", zsnr=True)
    (plain,) = run_node("ModelSamplingDiscrete", model=image, sampling="v_prediction", zsnr=False)
    kept = sampling_of(apply(run_node, changed, module))
    ordinary = sampling_of(apply(run_node, plain, module))
    assert 1000 < float(kept.sigma_max) == pytest.approx(float(sampling_of(changed).sigma_max), rel=1e-3)
    assert not torch.equal(kept.sigmas, sampling_of(changed).sigmas)
    assert float(ordinary.sigma_max) < 100


def test_a_model_without_discrete_steps_keeps_its_schedule(image: ModelPatcher, module: MotionModule,
                                                           run_node: Run) -> None:
    edm = {"sampling": "eps", "sigma_max": 120.0, "sigma_min": 0.002}
    (continuous,) = run_node("ModelSamplingContinuousEDM", model=image, **edm)
    with pytest.raises(ModelMismatchError, match="'linear .AnimateDiff.' needs a model with discrete time steps.*"
                                                 "Choose 'image model's own'"):
        apply(run_node, continuous, module)
    kept = sampling_of(apply(run_node, continuous, module, noise_schedule="image model's own"))
    assert float(kept.sigma_max) == pytest.approx(120.0)


# --- frames in a call --------------------------------------------------------------------------------------------

@contextmanager
def counted(model: ModelPatcher) -> Iterator[list[tuple[int, list[int]]]]:
    """Images and condition labels of every call of the host's UNet."""
    calls: list[tuple[int, list[int]]] = []

    def note(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args[0].shape[0], list(kwargs["transformer_options"]["cond_or_uncond"])))

    hook = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


def no_room(device: object = None, torch_free_too: bool = False) -> Any:
    """The host's question how much memory is free: none, where it decides whether two conditions share a call."""
    return (2.0**30, 2.0**30) if torch_free_too else 0.0


@pytest.mark.parametrize("variant", [V1, V2, SDXL_BETA], ids=lambda variant: variant.name)
def test_conditions_in_one_call_or_two(variant: Variant, image: ModelPatcher, run_node: Run,
                                       watched: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    video = apply(run_node, image, watched(motion_module(variant=variant)), strength_per_frame=[1.0, 0.5, 0.2, 1.5])
    with counted(video) as together:
        one = draw(video, noise())
    monkeypatch.setattr(comfy.model_management, "get_free_memory", no_room)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0.0, raising=False)  # asked by newer hosts
    with counted(video) as apart:
        two = draw(video, noise())
    assert {images for images, _ in together} == {8} and {images for images, _ in apart} == {4}
    assert error(two, one) < SAME


def test_conditions_of_lengths_that_cannot_share_a_call(image: ModelPatcher, run_node: Run,
                                                        watched: Watch) -> None:
    """The host itself runs texts of 77 and 41 tokens apart; each call is one whole clip."""
    made = watched(motion_module(variant=V1))
    video = apply(run_node, image, made, **OWN)
    with counted(video) as calls:
        found = draw(video, noise(), tokens=(77, 41))
    assert {images for images, _ in calls} == {4} and {tuple(labels) for _, labels in calls} == {(0,), (1,)}
    assert error(found, draw(apply(run_node, image, made, frames=4, **OWN), noise(), tokens=(77, 41))) < SAME
    assert error(found, draw(image, noise(), tokens=(77, 41))) > 1e-2


@pytest.mark.parametrize("variant", [V1, V2, SDXL_BETA], ids=lambda variant: variant.name)
def test_two_videos_in_a_batch_are_the_two_videos(variant: Variant, image: ModelPatcher, run_node: Run,
                                                  watched: Watch) -> None:
    per_frame = {"strength_per_frame": [1.0, 0.3, 0.7, 1.2], "motion_scale_per_frame": "0: 0.5, 3: 1.5"}
    made = watched(motion_module(variant=variant))
    both = draw(apply(run_node, image, made, frames=4, **per_frame), noise(8))
    alone = apply(run_node, image, made, **per_frame)
    assert error(both[:4], draw(alone, noise(8)[:4])) < SAME
    assert error(both[4:], draw(alone, noise(8)[4:])) < SAME
    assert error(draw(apply(run_node, image, made, **per_frame), noise(8)), both) > 1e-2


def test_module_has_effect_and_leaves_the_image_model_alone(image: ModelPatcher, module: MotionModule,
                                                            run_node: Run) -> None:
    plain = draw(image, noise())
    video = apply(run_node, image, module, noise_schedule="image model's own")
    moving = draw(video, noise())
    assert error(moving, plain) > 0.05
    assert torch.equal(draw(image, noise()), plain) and torch.equal(draw(video, noise()), moving)


# --- when it acts ------------------------------------------------------------------------------------------------

OWN = {"noise_schedule": "image model's own"}


@contextmanager
def slot_calls(video: ModelPatcher) -> Iterator[list[dict]]:
    """What the layers of the pack are told in every call of the host's network."""
    seen: list[dict] = []

    def note(executor: Callable, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options") or next(arg for arg in reversed(args) if isinstance(arg, dict))
        seen.append(options)
        return executor(*args, **kwargs)

    video.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    yield seen
    video.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, "test")


def active_in(seen: list[dict]) -> list[set[int]]:
    return [set(options.get("latentmotion_calls", {})) for options in seen]


def test_full_range_is_the_default(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    assert torch.equal(draw(apply(run_node, image, module, start_percent=0.0, end_percent=1.0), noise()),
                       draw(inflate(image, module, schedule=Schedule.LINEAR), noise()))


NEVER = [{"start": 0.5, "end": 0.5}, {"start": 1.0, "end": 1.0}, {"start": 0.8, "end": 0.2},
         {"strength": frame_values(0.0, None)}]


@pytest.mark.parametrize("settings", NEVER)
def test_an_empty_part_is_the_image_model(settings: dict, image: ModelPatcher, watched: Watch) -> None:
    made = watched(motion_module(variant=V1))
    assert torch.equal(draw(inflate(image, made, **settings), noise(), 3), draw(image, noise(), 3))


@pytest.mark.parametrize(("start", "end", "active"), [
    (0.0, 1.0, [1, 1, 1, 1]), (0.0, 0.2, [1, 0, 0, 0]), (0.2, 1.0, [0, 1, 1, 1]), (0.2, 0.5, [0, 1, 0, 0]),
    (0.9, 1.0, [0, 0, 0, 1]), (0.0, 0.01, [1, 0, 0, 0]), (0.99, 1.0, [0, 0, 0, 1]),
])
def test_part_of_the_run(start: float, end: float, active: list[int], image: ModelPatcher, module: MotionModule,
                         run_node: Run) -> None:
    """Four steps, at 0, 1/3, 2/3 and all of the training steps."""
    video = apply(run_node, image, module, start_percent=start, end_percent=end, **OWN)
    with slot_calls(video) as seen:
        draw(video, noise(), 4)
    assert [len(numbers) for numbers in active_in(seen)] == active


def test_two_halves_make_the_whole(image: ModelPatcher, run_node: Run, watched: Watch) -> None:
    """Two modules of the same weights, one for each half of the run: each step belongs to exactly one of them."""
    first, second = watched(motion_module(variant=V1)), watched(motion_module(variant=V1))
    halves = apply(run_node, image, first, end_percent=0.5)
    halves = apply(run_node, halves, second, start_percent=0.5)
    with slot_calls(halves) as seen:
        joined = draw(halves, noise(), 5)
    assert active_in(seen) == [{0}, {0}, {0}, {1}, {1}] or active_in(seen) == [{0}, {0}, {1}, {1}, {1}]
    assert error(joined, draw(apply(run_node, image, first), noise(), 5)) < SAME


# --- several modules ---------------------------------------------------------------------------------------------

PLACES = {**{f"down_blocks.{i}.motion_modules.{j}": (f"input_blocks.{3 * i + 1 + j}", 0 if i == 3 else 1)
             for i in range(4) for j in range(2)}, "mid_block.motion_modules.0": ("middle_block", 1),
          **{f"up_blocks.{i}.motion_modules.{j}": (f"output_blocks.{3 * i + j}", 0 if i == 0 else 1)
             for i in range(4) for j in range(3)}}


@contextmanager
def hooked(image: ModelPatcher, *modules: MotionModule, frames: int = 4, **settings: Tensor) -> Iterator[None]:
    """The reference's temporal transformers behind the published layers, one module after another.

    settings: strength, key_scale, (frames, 1, 1, 1) each.
    """
    layers = dict(image.model.diffusion_model.named_modules())
    hooks = []
    for made in modules:
        weights = made.patcher.model.state_dict()
        for slot, (block, layer) in PLACES.items():
            stem = f"{slot}.temporal_transformer."
            part = {name.removeprefix(stem): t for name, t in weights.items() if name.startswith(stem)}

            def move(_: torch.nn.Module, args: tuple, out: Tensor, part: dict = part) -> Tensor:
                each = {name: value.repeat(len(out) // frames, 1, 1, 1).expand(-1, 1, *out.shape[-2:])
                        for name, value in settings.items()}
                return reference.temporal_transformer(out, part, frames, **each).to(out.dtype)

            hooks.append(layers[f"{block}.{layer}"].register_forward_hook(move))
    yield
    for hook in hooks:
        hook.remove()


def test_modules_act_one_after_another(image: ModelPatcher, run_node: Run, watched: Watch) -> None:
    first, second = watched(motion_module(0)), watched(motion_module(1))
    one = apply(run_node, apply(run_node, image, first, **OWN), second, **OWN)
    other = apply(run_node, apply(run_node, image, second, **OWN), first, **OWN)
    with hooked(image, first, second):
        expected = draw(image, noise())
    found = draw(one, noise())
    assert error(found, expected) < SAME
    assert error(draw(other, noise()), found) > 1e-2, "the order on the canvas must matter"


def test_strength_and_scale_per_frame_in_the_whole_network(image: ModelPatcher, module: MotionModule,
                                                           run_node: Run) -> None:
    strength, scale = [0.0, 0.5, 1.0, 1.5], [2.0, 0.5, 1.0, 0.1]
    video = apply(run_node, image, module, strength=0.8, motion_scale=1.5, strength_per_frame=strength,
                  motion_scale_per_frame="2, 0.5, 1, 0.1", **OWN)
    maps = {"strength": torch.tensor(strength).view(4, 1, 1, 1) * 0.8,
            "key_scale": torch.tensor(scale).view(4, 1, 1, 1) * 1.5}
    with hooked(image, module, **maps):
        expected = draw(image, noise())
    assert error(draw(video, noise()), expected) < SAME


def test_the_same_module_twice_is_refused(image: ModelPatcher, module: MotionModule, run_node: Run) -> None:
    video = apply(run_node, image, module)
    with pytest.raises(ModelMismatchError, match="tiny-0 is already applied to this MODEL"):
        apply(run_node, video, module)
    with pytest.raises(ModelMismatchError, match="already applied.*put all MotionLoRAs on one motion module"):
        apply(run_node, video, helpers_motion.motion_lora(module))
    apply(run_node, image, module)


# --- the image model's attention ---------------------------------------------------------------------------------

@pytest.fixture
def asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every attention that the host's own function for PyTorch's kernel computes."""
    asked, original = [], host_attention.attention_pytorch

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(host_attention, "attention_pytorch", counting)
    return asked


def test_image_attention_may_be_pytorchs(image: ModelPatcher, module: MotionModule, run_node: Run,
                                         asked_of_torch: list[int]) -> None:
    """The host of the tests runs on the CPU, where it takes its sub-quadratic attention by itself."""
    own = draw(apply(run_node, image, module), noise())
    assert not asked_of_torch
    video = apply(run_node, image, module, image_attention="PyTorch's")
    assert error(draw(video, noise()), own) < SAME and asked_of_torch
    asked_of_torch.clear()
    draw(image, noise())
    assert not asked_of_torch


def test_an_attention_that_another_node_set_stays(image: ModelPatcher, module: MotionModule, run_node: Run,
                                                  asked_of_torch: list[int]) -> None:
    called = []

    def other(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        called.append(1)
        return function(*args, **kwargs)

    image.model_options["transformer_options"]["optimized_attention_override"] = other
    draw(apply(run_node, image, module, image_attention="PyTorch's"), noise())
    assert called and not asked_of_torch


# --- context windows ---------------------------------------------------------------------------------------------

WINDOWS = {"context_length": 4, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1,
           "closed_loop": False, "fuse_method": "pyramid", "dim": 0}


def windowed(run_node: Run, core_nodes: dict[str, type], model: ModelPatcher, **settings: Any) -> ModelPatcher:
    """Through the host's Context Windows (Manual); newer hosts ask whether to shuffle noise, too."""
    execute = inspect.signature(core_nodes["ContextWindowsManual"].execute)
    newer = {"freenoise": False} if "freenoise" in execute.parameters else {}
    return run_node("ContextWindowsManual", model=model, **(WINDOWS | newer | settings))[0]


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"])
def test_values_follow_the_frame_under_context_windows(schedule: str, image: ModelPatcher, module: MotionModule,
                                                       run_node: Run, core_nodes: dict[str, type]) -> None:
    values = [0.1 * i for i in range(10)]
    video = apply(run_node, image, module, strength_per_frame=values, motion_scale_per_frame=[1 + v for v in values])
    video = windowed(run_node, core_nodes, video, context_schedule=schedule)
    with slot_calls(video) as seen:
        draw(video, noise(10))
    assert {frame for options in seen for frame in options["context_window"].index_list} == set(range(10))
    for options in seen:
        call, indices = options["latentmotion_calls"][0], list(options["context_window"].index_list)
        clips = len(options["cond_or_uncond"])
        anchor = call.frames - len(indices)  # newer hosts may put the first frame before a window
        assert anchor in (0, 1)
        found = call.strength.flatten().view(clips, call.frames)[:, anchor:]
        assert torch.allclose(found, torch.tensor([values[i] for i in indices]).expand(clips, -1))
        scale = call.scale.flatten().view(clips, call.frames)[:, anchor:]
        assert torch.allclose(scale, 1 + torch.tensor([values[i] for i in indices]).expand(clips, -1))
        assert call.positions.tolist()[anchor:] == list(range(len(indices))) or anchor


def test_a_window_of_zeros_is_the_image_model(image: ModelPatcher, module: MotionModule, run_node: Run,
                                              core_nodes: dict[str, type]) -> None:
    """Two windows that do not touch: the first moves as a clip of its own, the second not at all."""
    video = apply(run_node, image, module, strength_per_frame=[1.0] * 4 + [0.0] * 4, **OWN)
    video = windowed(run_node, core_nodes, video, context_overlap=0)
    clip = draw(video, noise(8))
    assert error(clip[4:], draw(image, noise(8))[4:]) < SAME
    alone = apply(run_node, image, module, **OWN)
    assert error(clip[:4], draw(alone, noise(8)[:4])) < SAME
