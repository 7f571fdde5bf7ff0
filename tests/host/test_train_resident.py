"""Trainings on hosts that keep a MODEL's weights off its device, and on MODELs that other nodes have patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from helpers_motion import SMALL
from helpers_train import WIDGETS, Pictures, Text, small_module
from latentmotion.host import options, train, train_stages, tune
from latentmotion.host.resident import resident
from latentmotion.motion_modules.errors import LatentMotionError
from latentmotion.motion_modules.files import read_weights
from test_train_lora import clip_of_a_moving_edge
from test_train_stages import ADAPTER, MODULE
from test_tune import WIDGETS as TUNING

pytest_plugins = ["helpers_train_fixtures"]
Train = Callable[[ModelPatcher], Any]


def trainings() -> Iterator[Train]:
    given = (Text(), Pictures(), clip_of_a_moving_edge(), "an edge")
    yield lambda model: train.train_motion_lora(model, small_module(), *given, options.lora_training(**WIDGETS))
    yield lambda model: train_stages.train_domain_adapter(model, *given, options.adapter_training(**ADAPTER))
    yield lambda model: train_stages.train_motion_module(model, *given, options.module_training(**MODULE))
    yield lambda model: tune.tune_video_model(model, *given, options.tuning(**TUNING))


ALL = ("MotionLoRA", "domain adapter", "motion module", "video model")


@pytest.fixture(params=range(len(ALL)), ids=ALL)
def learn(request: pytest.FixtureRequest, folder: Path) -> Train:
    return list(trainings())[request.param]


class Dynamic(ModelPatcher):
    """As newer hosts have it: its own weights are not to be worked on; `other` is what the host loads for that."""

    other: ModelPatcher | None = None

    def is_dynamic(self) -> bool:
        return True

    def get_non_dynamic_delegate(self) -> ModelPatcher:
        if self.other is None:
            raise RuntimeError("cached_patcher_init is not initialized")
        made = self.other.clone()
        made.patches, made.model_options = dict(self.patches), self.model_options
        return made


def dynamic(model: ModelPatcher) -> Dynamic:
    made = Dynamic(model.model, model.load_device, model.offload_device)
    made.model_options = model.model_options
    return made


def test_the_network_that_learns_is_the_one_on_the_device(learn: Train, model: ModelPatcher) -> None:
    other, model = tiny_host.sd15(**SMALL), dynamic(model)
    other.model.load_state_dict(model.model.state_dict())
    with pytest.raises(LatentMotionError, match="Start ComfyUI with --disable-dynamic-vram to train"):
        learn(model)
    model.other, model.model.apply_model = other, refuse
    learn(model)


def test_a_model_of_older_hosts_is_cloned(model: ModelPatcher) -> None:
    found = resident(model)
    assert found is not model and found.model is model.model


def refuse(*given: Any, **more: Any) -> None:
    raise RuntimeError("this is for sampling")


PATCHES: dict[str, Callable[[ModelPatcher], None]] = {
    "output block (FreeU)": lambda model: model.set_model_output_block_patch(refuse),
    "attention (ToMe)": lambda model: model.set_model_attn1_patch(refuse),
    "attention replaced": lambda model: model.set_model_attn1_replace(refuse, "input", 1, 0),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_what_other_nodes_patch_for_sampling_stays_out(kind: str, learn: Train, model: ModelPatcher, folder: Path
                                                       ) -> None:  # fmt: skip
    def result() -> dict[str, torch.Tensor]:
        (file,) = folder.glob("*.safetensors")
        found = read_weights(file)
        file.unlink()
        return found

    learn(model)
    plain, patched = result(), model.clone()
    PATCHES[kind](patched)
    learn(patched)
    left, right = plain, result()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
