"""The host's TorchCompileModel takes a MODEL with motion in one graph, and the clip stays the clip.

`torch.compile` runs here without generating code: tracing, guards and the rewriting of in-place work are the real
ones. The network is the host's with one level, to keep the tracing short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_host
import torch
import torch._dynamo
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from helpers_memory import MOST_GROWTH, level, resident_bytes
from helpers_motion import inflate, motion_module, relative_error
from helpers_restored import Watch
from latentmotion.motion_modules.animatediff.spec import V1, V2, Variant
from latentmotion.sampling.frame_values import FrameValues
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

pytest_plugins = ["helpers_fixtures"]

ONE_LEVEL = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}
FRAMES = 3


class Counting:
    """A backend that counts the graphs it is given, and runs them as they are or as code generation would get them."""

    def __init__(self, rewrite: Callable | None = None) -> None:
        self.graphs, self.rewrite = 0, rewrite

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Callable:
        self.graphs += 1
        return self.rewrite(graph, inputs) if self.rewrite else graph.forward


@pytest.fixture(scope="module", autouse=True)
def _dynamo_is_set_up() -> None:
    """torch itself replaces methods of its Module class at the first compilation; the tests watch over them."""
    torch.compile(torch.nn.Linear(2, 2), backend=Counting())(torch.zeros(1, 2))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _image() -> ModelPatcher:
    """With the attention the host takes on a GPU: the one it takes on a CPU breaks the graph by reading free memory."""
    model = tiny_host.sd15(**ONE_LEVEL)
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda default, *args, **kw: attention_pytorch(*args, **kw)
    return model


def _module(variant: Variant = V2) -> Any:
    return motion_module(variant=variant, widths=(32,), layers=1)


@pytest.mark.parametrize("variant", [V2, V1], ids=["v2", "v1"])
def test_one_graph_for_all_steps_of_all_runs(variant: Variant, run_node: Callable, watched: Watch) -> None:
    backend = Counting(aot_eager)
    video = inflate(watched(_image()), watched(_module(variant)))
    eager = tiny_host.sample(video, FRAMES, steps=3)
    (compiled,) = run_node("TorchCompileModel", model=video, backend=backend)
    for _ in range(2):
        assert relative_error(tiny_host.sample(compiled, FRAMES, steps=3), eager) < 1e-5
    assert backend.graphs == 1
    assert not counters["graph_break"]


SETTINGS = {
    "as it was compiled": (FRAMES, 2.0, {}),
    "as many images, more frames": (2 * FRAMES, 1.0, {}),
    "strength": (FRAMES, 2.0, {"strength": FrameValues(0.5)}),
}


def test_settings_changed_after_compiling_count(run_node: Callable, watched: Watch) -> None:
    """Apply Motion Module behind TorchCompileModel: another setting is not answered with the old graph.

    Newer hosts drop the guards on everything in `transformer_options`.
    """
    image, module = watched(_image()), watched(_module())
    (compiled,) = run_node("TorchCompileModel", model=image, backend=Counting())
    clips = []
    for name, (frames, cfg, settings) in SETTINGS.items():
        eager = tiny_host.sample(inflate(image, module, **settings), frames, steps=1, cfg=cfg)
        clip = tiny_host.sample(inflate(compiled, module, **settings), frames, steps=1, cfg=cfg)
        assert relative_error(clip, eager) < 1e-5, name
        clips.append(clip)
    assert not counters["graph_break"]
    assert all(a.shape != b.shape or relative_error(a, b) > 1e-3 for a, b in zip(clips, clips[1:], strict=False))


def test_frame_attention_changed_after_compiling_counts(run_node: Callable, watched: Watch) -> None:
    """ST-Attention behind TorchCompileModel, by the images of one shape: every other choice is another clip."""
    image, made = watched(_image()), []
    (compiled,) = run_node("TorchCompileModel", model=image, backend=Counting())
    for mode, frames in (("first and previous", 0), ("first and previous", 2), ("full", 2)):
        eager, clip = (
            tiny_host.sample(run_node("LatentMotionSTAttention", model=model, keys_from=mode, joint_group_norm=False,
                                      frames=frames)[0], 4, steps=1) for model in (image, compiled))  # fmt: skip
        assert relative_error(clip, eager) < 1e-5, (mode, frames)
        made.append(clip)
    assert not counters["graph_break"]
    assert all(relative_error(a, b) > 1e-3 for a, b in zip(made, made[1:], strict=False))


def test_twenty_runs_of_a_compiled_model_leave_nothing_behind(run_node: Callable, watched: Watch) -> None:
    (compiled,) = run_node(
        "TorchCompileModel", model=inflate(watched(_image()), watched(_module())), backend=Counting()
    )
    tiny_host.sample(compiled, FRAMES, steps=1)
    before, resident = level(), resident_bytes()
    for _ in range(20):
        tiny_host.sample(compiled, FRAMES, steps=1)
    grown = {name: count - before[name] for name, count in level().items() if count > before[name]}
    assert not grown, "what earlier tests left may go meanwhile, and nothing may come"
    assert resident_bytes() - resident < MOST_GROWTH
