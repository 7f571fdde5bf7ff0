"""ST-Attention: every frame sees the frames that were chosen, whatever else is on the MODEL, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import helpers_motion
import pytest
import tiny_host
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL, SMALL_WIDTHS, Pair, relative_error
from latentmotion.host.attention import FrameBlock
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.motion_modules.errors import ClipError, ModelMismatchError
from latentmotion.sampling.windows import WindowPlan
from torch import Tensor

FRAMES, SAME = 4, 1e-5
MODES = ("first and previous", "per frame", "causal", "full")
WIDGETS = {"keys_from": "first and previous", "joint_group_norm": True, "frames": 0}


@pytest.fixture(scope="module")
def _pair() -> Pair:
    with torch.inference_mode():
        still = helpers_motion.motion_module(widths=SMALL_WIDTHS, layers=1, still=True)
        return Pair(tiny_host.sd15(**SMALL), helpers_motion.motion_module(widths=SMALL_WIDTHS, layers=1), still)


@pytest.fixture
def pair(_pair: Pair) -> Iterator[Pair]:
    """One image model for all tests; each must leave it as it was, down to the picture it draws."""
    yield _pair
    comfy.model_management.interrupt_current_processing(False)
    _pair.assert_untouched()


@pytest.fixture
def attend(run_node: Callable) -> Callable[..., ModelPatcher]:
    def node(model: ModelPatcher, **widgets: Any) -> ModelPatcher:
        return run_node("LatentMotionSTAttention", model=model, **(WIDGETS | widgets))[0]

    return node


def call(model: ModelPatcher, x: Tensor, chunks: int = 1) -> Tensor:
    """One call of the model on a clip of noise; with two chunks, two conditionings in one batch."""
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    options = model.model_options["transformer_options"] | {
        "cond_or_uncond": list(range(chunks)), "wrappers": model.wrappers, "callbacks": model.callbacks}  # fmt: skip
    text = torch.cat([tiny_host.conditioning(model, seed)[0][0].expand(len(x), -1, -1) for seed in range(chunks)])
    x = x.repeat(chunks, 1, 1, 1)
    return model.model.apply_model(x, torch.full((len(x),), 5.0), c_crossattn=text, transformer_options=options)


def clip(frames: int = FRAMES, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(seed))


def seen_by(mode: str, frame: int) -> list[int]:
    return {"first and previous": [0, max(frame - 1, 0)], "per frame": [frame], "causal": list(range(frame + 1)),
            "full": list(range(FRAMES))}[mode]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_each_frame_sees_the_frames_that_were_chosen(
    mode: str, pair: Pair, attend: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against self-attention written out with one softmax per frame, in every transformer block of one call."""
    worst = []

    def watched(self: Any, x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:
        halves = self.norm1(x).unflatten(0, (2, FRAMES))
        expected = torch.stack([
            self.attn1(half[i : i + 1], context=torch.cat([half[j] for j in seen_by(mode, i)])[None])[0]
            for half in halves for i in range(FRAMES)
        ])  # fmt: skip
        found: list[Tensor] = []
        hook = self.attn1.to_out.register_forward_hook(lambda _, args, out: found.append(out))
        out = real(self, x, context=context, transformer_options=transformer_options)
        hook.remove()
        worst.append(relative_error(found[0], expected))
        return out

    real = BasicTransformerBlock.forward
    with monkeypatch.context() as patch:
        patch.setattr(BasicTransformerBlock, "forward", watched)
        call(attend(pair.plain, keys_from=mode), clip(), chunks=2)
    assert len(worst) == 7 and max(worst) < SAME


def test_first_frame_is_an_image_and_nobody_but_the_next_sees_a_later_one(pair: Pair, attend: Callable) -> None:
    model = attend(pair.plain, joint_group_norm=False)
    x, plain = clip(), call(pair.plain, clip())
    found = call(model, x)
    assert relative_error(found[0], plain[0]) < SAME and relative_error(found[1:], plain[1:]) > 1e-2
    last = x.clone()
    last[-1] = clip(seed=5)[-1]
    again = call(model, last)
    assert torch.equal(again[:-1], found[:-1]) and not torch.equal(again[-1], found[-1])


def test_per_frame_without_joint_norms_changes_nothing(pair: Pair, attend: Callable) -> None:
    model = attend(pair.plain, keys_from="per frame", joint_group_norm=False)
    assert torch.equal(call(model, clip()), call(pair.plain, clip()))


def test_joint_norms_are_those_of_tune_a_video(pair: Pair, attend: Callable) -> None:
    """Residual layers and the output over all frames, the transformers' norms per frame: those of AnimateDiff v1."""
    from latentmotion.motion_modules.animatediff.spec import V1

    v1 = helpers_motion.motion_module(widths=SMALL_WIDTHS, layers=1, variant=V1, still=True)
    model = attend(pair.plain, keys_from="per frame")
    assert relative_error(call(model, clip()), call(pair.video(v1), clip())) < SAME
    assert relative_error(call(model, clip()), call(pair.plain, clip())) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_conditionings_in_one_batch_or_apart_and_several_clips(mode: str, pair: Pair, attend: Callable) -> None:
    model = attend(pair.plain, keys_from=mode)
    alone = call(model, clip())
    assert relative_error(call(model, clip(), chunks=2)[:FRAMES], alone) < SAME
    two = call(attend(pair.plain, keys_from=mode, frames=FRAMES), torch.cat((clip(), clip(seed=1))))
    assert relative_error(two[:FRAMES], alone) < SAME
    assert relative_error(two[FRAMES:], call(model, clip(seed=1))) < SAME


def test_order_of_nodes_does_not_matter_and_frames_follow_the_motion_module(pair: Pair, attend: Callable) -> None:
    first = pair.video(base=attend(pair.plain, joint_group_norm=False), frames=2)
    then = attend(pair.video(frames=2), joint_group_norm=False)
    assert torch.equal(call(first, clip()), call(then, clip()))
    half = pair.video(base=attend(pair.plain, joint_group_norm=False))
    assert relative_error(call(first, clip())[:2], call(half, clip()[:2])) < SAME
    still = attend(pair.still, joint_group_norm=False)
    assert relative_error(call(still, clip()), call(attend(pair.plain, joint_group_norm=False), clip())) < SAME


def test_the_last_node_counts(pair: Pair, attend: Callable) -> None:
    twice = attend(attend(pair.plain, keys_from="full", frames=2), joint_group_norm=False)
    assert torch.equal(call(twice, clip()), call(attend(pair.plain, joint_group_norm=False), clip()))


def test_a_window_is_a_clip(pair: Pair, attend: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    real = FrameBlock.__init__

    def noted(self: Any, block: Any, reach: Any, frames: int) -> None:
        counts.append(frames)
        real(self, block, reach, frames)

    with monkeypatch.context() as patch:
        patch.setattr(FrameBlock, "__init__", noted)
        model = apply_context(attend(pair.plain), SlidingContext(WindowPlan(length=3, overlap=1)))
        tiny_host.sample(model, 5, steps=1)
    assert set(counts) == {3}


def test_with_controlnet_the_hints_stay_per_frame(pair: Pair, attend: Callable, run_node: Callable) -> None:
    positive, negative = run_node(
        "ControlNetApplyAdvanced", positive=tiny_host.conditioning(pair.plain, 1),
        negative=tiny_host.conditioning(pair.plain, 2), control_net=tiny_host.controlnet(**SMALL),
        image=torch.rand(FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(1)), strength=1.0,
        start_percent=0.0, end_percent=1.0)  # fmt: skip
    run = {"steps": 1, "positive": positive, "negative": negative}
    model = attend(pair.plain, joint_group_norm=False)
    held, free = tiny_host.sample(model, FRAMES, **run), tiny_host.sample(model, FRAMES, steps=1)
    assert relative_error(held, free) > 1e-3
    image = tiny_host.sample(pair.plain, FRAMES, **run)
    assert relative_error(held[0], image[0]) < 1e-4 and relative_error(held[1:], image[1:]) > 1e-3


def test_another_packs_replacement_of_a_block_goes_first(pair: Pair, attend: Callable) -> None:
    model = attend(pair.plain)
    expected = call(model, clip())
    model = model.clone()
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0, 0)
    shapes = []
    model.set_model_attn1_patch(lambda n, k, v, extra: (shapes.append(n.shape), (n, k, v))[1])
    assert relative_error(call(model, clip()), expected) > 1e-3
    assert len(shapes) == 7 and {shape[0] for shape in shapes} == {FRAMES}


def _out_of_memory() -> None:
    raise comfy.model_management.OOM_EXCEPTION("injected: out of memory")


def _fail() -> None:
    raise RuntimeError("injected failure")


@pytest.mark.parametrize(("breaking", "error"), [
    (lambda: comfy.model_management.interrupt_current_processing(True),
     comfy.model_management.InterruptProcessingException),
    (_fail, RuntimeError), (_out_of_memory, comfy.model_management.OOM_EXCEPTION),
], ids=["cancelled", "failed", "out of memory"])  # fmt: skip
def test_a_run_that_breaks_leaves_the_model_as_it_was(
    breaking: Callable, error: type, pair: Pair, attend: Callable
) -> None:
    """In the last transformer block, with every stand-in in place; the fixture compares bits."""
    model, seen = attend(pair.plain), []
    unet = pair.plain.model.diffusion_model
    layer = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)][-1].norm3

    def trap(*_: Any) -> None:
        seen.append(sum(isinstance(module, FrameBlock) for module in unet.modules()))
        breaking()

    hook = layer.register_forward_pre_hook(trap)
    try:
        with pytest.raises(error):
            tiny_host.sample(model, FRAMES)
    finally:
        hook.remove()
    assert seen[0] == 7
    assert not any(isinstance(module, FrameBlock) for module in unet.modules())


def test_what_cannot_be_is_said(pair: Pair, attend: Callable) -> None:
    with pytest.raises(ValueError, match="not one of its choices"):
        attend(pair.plain, keys_from="all of them")
    with pytest.raises(ClipError, match="clips of 3 frames, and Apply Motion Module takes clips of 2"):
        call(attend(pair.video(frames=2), frames=3), clip(6))
    with pytest.raises(ClipError, match="holds 4 images, which 3 frames"):
        call(attend(pair.plain, frames=3), clip())

    class Other(torch.nn.Module):
        pass

    other = pair.plain.clone()
    other.add_object_patch("diffusion_model", Other())
    with pytest.raises(ModelMismatchError, match="this MODEL is a Other"):
        attend(other)


def test_deep_transformers(attend: Callable) -> None:
    """SDXL has several blocks in one transformer: the host's index of each stays what it is."""
    image = tiny_host.sdxl()
    model, indices = attend(image, joint_group_norm=False), set()

    def note(n: Tensor, k: Tensor, v: Tensor, extra: dict) -> tuple:
        indices.add((*extra["block"], extra["block_index"]))
        return n, k, v

    model.set_model_attn1_patch(note)
    found = tiny_host.sample(model, 2, steps=1)
    plain = tiny_host.sample(image, 2, steps=1)
    assert relative_error(found[0], plain[0]) < 1e-4 and relative_error(found[1], plain[1]) > 1e-3
    assert {index for *_, index in indices} == {0, 1}
