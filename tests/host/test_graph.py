"""Whole graphs through the host's own executor: cached nodes, two models side by side, cancel and errors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import safetensors.torch
import tiny_host
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from helpers_motion import Pair, inflate, motion_spec, motion_weights
from latentmotion.host.motion import load_motion_module
from latentmotion.host.unet import MotionSlot
from latentmotion.motion_modules.animatediff.network import MotionModel, sinusoid
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

FRAMES = 3
MODULE, ZOOM, PAN = "graph-tiny.safetensors", "graph-zoom.safetensors", "graph-pan.safetensors"
APPLY = {
    "strength": 1.0, "motion_scale": 1.0, "start_percent": 0.0, "end_percent": 1.0, "frames": 0,
    "noise_schedule": "image model's own", "positions": "as trained", "group_norm": "as trained",
}  # fmt: skip
ENDINGS: dict[str, Callable[[], Any]] = {
    "cancel": lambda: comfy.model_management.interrupt_current_processing(True),
    "failure": lambda: (_ for _ in ()).throw(RuntimeError("injected failure")),
    "out of memory": lambda: (_ for _ in ()).throw(comfy.model_management.OOM_EXCEPTION("injected")),
}


def _write_files() -> None:
    """A motion module and two MotionLoRAs where the host looks for them."""
    spec = motion_spec()
    weights = motion_weights(spec)
    for slot, channels in spec.slots:
        stem = f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks"
        table = sinusoid(torch.arange(spec.positions), channels)[None].contiguous()
        weights |= {f"{stem}.{i}.pos_encoder.pe": table.clone() for i in range(spec.attentions)}
    safetensors.torch.save_file(weights, f"{folder_paths.get_folder_paths('animatediff_models')[0]}/{MODULE}")
    for seed, name in enumerate((ZOOM, PAN)):
        generator, pairs = torch.Generator().manual_seed(seed), {}
        for slot, channels in spec.slots:
            stem = f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora"
            pairs[f"{stem}.down.weight"] = torch.randn(2, channels, generator=generator) * 0.5
            pairs[f"{stem}.up.weight"] = torch.randn(channels, 2, generator=generator)
        safetensors.torch.save_file(pairs, f"{folder_paths.get_folder_paths('animatediff_motion_lora')[0]}/{name}")


@pytest.fixture(scope="module")
def motion_files(pack_nodes: dict[str, type]) -> None:
    for folder in ("animatediff_models", "animatediff_motion_lora"):
        Path(folder_paths.get_folder_paths(folder)[0]).mkdir(parents=True, exist_ok=True)
    _write_files()


@pytest.fixture
def clips(
    pair: Pair, core_nodes: dict[str, type], motion_files: None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Nodes the tests need beside the host's: sources of tiny models and prompts, a trap, and a sink for latents."""
    kept: dict[str, Tensor] = {}

    class TinyModel:
        FUNCTION, RETURN_TYPES, CATEGORY = "run", ("MODEL",), "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def run(self) -> tuple:
            return (pair.plain,)

    class TinyPrompt:
        FUNCTION, RETURN_TYPES, CATEGORY = "run", ("CONDITIONING",), "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {"default": 0})}})

        def run(self, seed: int) -> tuple:
            return (tiny_host.conditioning(pair.plain, seed),)

    class TinyTrap:
        """From the second call of the network that samples with this MODEL on, something happens."""

        FUNCTION, RETURN_TYPES, CATEGORY = "run", ("MODEL",), "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "ending": (list(ENDINGS),)}})

        def run(self, model: ModelPatcher, ending: str) -> tuple:
            calls = iter(range(100))

            def spring(executor: Callable, *args: Any, **kw: Any) -> Tensor:
                if next(calls) >= 1:
                    ENDINGS[ending]()
                return executor(*args, **kw)

            trapped = model.clone()
            trapped.add_wrapper_with_key("diffusion_model", "trap", spring)
            return (trapped,)

    class TinyKeep:
        FUNCTION, RETURN_TYPES, OUTPUT_NODE, CATEGORY = "run", (), True, "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"samples": ("LATENT",), "name": ("STRING", {})}})

        def run(self, samples: dict, name: str) -> dict:
            kept[name] = samples["samples"].clone()
            return {"ui": {"kept": [name]}}

    for node in (TinyModel, TinyPrompt, TinyTrap, TinyKeep):
        monkeypatch.setitem(core_nodes, node.__name__, node)
    return kept


def _node(class_type: str, **inputs: Any) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def _graph(**samplers: str) -> dict[str, dict]:
    """A graph with one KSampler and one sink for each name; the value names the node its MODEL comes from."""
    prompt = {
        "image": _node("TinyModel"),
        "positive": _node("TinyPrompt", seed=1),
        "negative": _node("TinyPrompt", seed=2),
        "latent": _node("EmptyLatentImage", width=64, height=64, batch_size=FRAMES),
        "module": _node("LatentMotionLoadMotionModule", motion_module=MODULE),
        "video": _node("LatentMotionApplyMotionModule", model=["image", 0], motion_module=["module", 0], **APPLY),
    }
    for name, source in samplers.items():
        prompt[f"sample {name}"] = _node(
            "KSampler", model=[source, 0], positive=["positive", 0], negative=["negative", 0], cfg=2.0, seed=0,
            latent_image=["latent", 0], steps=2, sampler_name="euler", scheduler="normal", denoise=1.0,
        )  # fmt: skip
        prompt[f"keep {name}"] = _node("TinyKeep", samples=[f"sample {name}", 0], name=name)
    return prompt


def _with_lora(prompt: dict[str, dict], *names: str) -> dict[str, dict]:
    """MotionLoRAs between the module and Apply Motion Module."""
    source = "module"
    for name in names:
        link = f"lora {name}"
        prompt[link] = _node("LatentMotionLoadMotionLora", motion_module=[source, 0], motion_lora=name, strength=0.7)
        source = link
    prompt["video"]["inputs"]["motion_module"] = [source, 0]
    return prompt


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_two_models_in_one_graph(order: tuple[str, str], pair: Pair, clips: dict, run_graph: Callable) -> None:
    """One with motion and one without, of the same loader: each is what it is alone, whichever runs first."""
    assert run_graph(_graph(**dict(zip(order, ("video", "image"), strict=True))))["success"]
    assert torch.equal(clips[order[1]], tiny_host.sample(pair.plain, FRAMES))
    alone = inflate(pair.plain, load_motion_module(MODULE))
    assert torch.equal(clips[order[0]], tiny_host.sample(alone, FRAMES))
    assert not torch.equal(clips["a"], clips["b"])


def test_second_run_comes_from_the_cache(pair: Pair, clips: dict, run_graph: Callable) -> None:
    """A changed widget runs Apply Motion Module and what follows it again, and nothing before it."""
    run_graph(_graph(a="video"))
    first = clips.pop("a")
    assert run_graph(_graph(a="video"))["success"] and "a" not in clips, "nothing changed, nothing runs"
    changed = _graph(a="video")
    changed["video"]["inputs"]["strength"] = 0.5
    ran: list[str] = []
    run_graph(changed, lambda event, data: ran.append(data["node"]) if event == "executing" else None)
    assert {node for node in ran if node} == {"video", "sample a", "keep a"}
    assert not torch.equal(clips["a"], first)
    run_graph(_graph(a="video"))
    assert torch.equal(clips["a"], first), "what came from the cache had not been changed by the other run"


def test_switching_motion_loras_between_runs(pair: Pair, clips: dict, run_graph: Callable) -> None:
    results = []
    for names in ((), (ZOOM,), (PAN,), (ZOOM, PAN), (), (PAN,)):
        assert run_graph(_with_lora(_graph(a="video", b="image"), *names))["success"]
        results.append(clips["a"])
    assert torch.equal(results[0], results[4]) and torch.equal(results[2], results[5])
    assert all(not torch.equal(a, b) for i, a in enumerate(results[:4]) for b in results[:i])
    assert torch.equal(clips["b"], tiny_host.sample(pair.plain, FRAMES))


@pytest.mark.parametrize("ending", ENDINGS)
def test_next_run_after_one_that_ended_badly(ending: str, pair: Pair, clips: dict, run_graph: Callable) -> None:
    run_graph(_graph(a="video", b="image"))
    expected = dict(clips)
    broken = _graph(a="trap", b="image")
    broken["trap"] = _node("TinyTrap", model=["video", 0], ending=ending)
    result = run_graph(broken)
    events = [event for event, _ in result["messages"]]
    assert not result["success"]
    assert ("execution_interrupted" if ending == "cancel" else "execution_error") in events
    pair.assert_nothing_left()
    changed = _graph(a="video", b="image")
    for name in ("sample a", "sample b"):
        changed[name]["inputs"]["seed"] = 1
    assert run_graph(changed)["success"]
    assert run_graph(_graph(a="video", b="image"))["success"]
    for name, clip in expected.items():
        assert torch.equal(clips[name], clip)


def test_one_frame_is_answered_with_a_sentence_on_the_node(clips: dict, run_graph: Callable) -> None:
    prompt = _graph(a="video")
    prompt["latent"]["inputs"]["batch_size"] = 1
    result = run_graph(prompt)
    error = next(data for event, data in result["messages"] if event == "execution_error")
    assert error["node_id"] == "sample a" and "batch_size" in error["exception_message"]


def test_many_runs_of_the_graph_load_each_network_once(clips: dict, run_graph: Callable) -> None:
    """A new MODEL and new MotionLoRAs in every run, over one image network and one motion module."""
    alive = []
    for number in range(6):
        prompt = _with_lora(_graph(a="video"), *((), (ZOOM,), (PAN,))[number % 3])
        prompt["video"]["inputs"]["strength"] = 0.5 + number / 100
        assert run_graph(prompt)["success"]
        gc.collect()
        found = gc.get_objects()
        alive.append([sum(isinstance(item, kind) for item in found) for kind in (UNetModel, MotionModel, MotionSlot)])
    assert alive == [alive[0]] * 6 and alive[0][2] == 0
