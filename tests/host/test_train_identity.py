"""Which training a file and a state are of: rounding does not matter, other clips, models and readers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy_extras.nodes_model_advanced as hosts_nodes
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from helpers_motion import inflate
from helpers_train import FRAMES, WIDGETS, Pictures, Recorder, Text, small_module
from latentmotion.host import options, paths, train, train_stages, tune, tuned
from latentmotion.host.attention import FrameAttention, apply_frame_attention
from latentmotion.motion_modules.errors import LatentMotionError
from test_train_lora import clip_of_a_moving_edge
from test_train_stages import ADAPTER, MODULE
from test_tune import WIDGETS as TUNING
from test_tuned import tuned_file

pytest_plugins = ["helpers_train_fixtures"]


class Room:
    """A MODEL, a motion module and what reads clips and captions for them; `learn()` is one run of Train MotionLoRA."""

    def __init__(self, model: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.module, self.monkeypatch = model, small_module(), monkeypatch
        self.steps: list[int] = []

    def learn(self, clips: Any = None, clip: Text | None = None, vae: Any = None, captions: str = "an edge",
              stop_at: int = 0, model: ModelPatcher | None = None, **widgets: Any) -> list[int]:  # fmt: skip
        """The steps that were taken."""
        seen: list[int] = []

        def at(step: int) -> None:
            seen.append(step)
            if step == stop_at:
                comfy.model_management.interrupt_current_processing()

        self.monkeypatch.setattr(train, "TrainingProgress", Recorder(at))
        how, self.steps = options.lora_training(**WIDGETS | widgets), seen
        clips = clip_of_a_moving_edge() if clips is None else clips
        read = (clip or Text(), vae or Pictures(), clips, captions)
        train.train_motion_lora(model or self.model, self.module, *read, how)
        return seen

    def cancel(self, **given: Any) -> list[int]:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            self.learn(stop_at=2, **given)
        comfy.model_management.interrupt_current_processing(False)
        return self.steps


@pytest.fixture
def room(model: ModelPatcher, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(model, monkeypatch)


def velocity(model: ModelPatcher) -> ModelPatcher:
    return hosts_nodes.ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]


OTHERS: dict[str, Callable[[Room], dict[str, Any]]] = {
    "clips": lambda room: {"clips": 0.9 * clip_of_a_moving_edge() + 0.05},
    "brightness": lambda room: {"clips": 0.98 * clip_of_a_moving_edge()},
    "order of the frames": lambda room: {"clips": clip_of_a_moving_edge().flip(0)},
    "caption": lambda room: {"captions": "a line"},
    "text encoder": lambda room: {"clip": Text(off=0.5)},
    "prediction": lambda room: {"model": velocity(room.model)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_not_taken_for_this_one(room: Room, folder: Path, what: str) -> None:
    """Neither its state nor its file: what was mended in the graph is never answered with what was there before."""
    room.cancel()
    other = OTHERS[what](room)
    with pytest.raises(LatentMotionError, match="was begun with other settings: clips, captions, frames or models"):
        room.learn(**other)
    room.learn()
    with pytest.raises(LatentMotionError, match="was made with other settings or clips"):
        room.learn(**other)
    assert len(room.learn(**other, existing="start over")) == WIDGETS["steps"]


def test_other_settings_are_named_as_the_widgets_are(room: Room, folder: Path) -> None:
    room.cancel()
    now = {"batch_size": 3, "rank": 2, "high_noise_weight": 9.0, "noise_levels": "half from the noisiest",
           "layers": "to_q, to_k"}  # fmt: skip
    with pytest.raises(LatentMotionError, match="was begun with other settings: ") as stopped:
        room.learn(**now)
    said = str(stopped.value)
    for part in ("(now 3)", "high_noise_weight 1 (now 9)", "noise_levels all alike (now half from the noisiest)",
                 "layers empty (now to_q, to_k)", "rank 4 (now 2)"):  # fmt: skip
        assert part in said, said
    assert "or models" not in said


def test_rounding_makes_no_other_run(room: Room, folder: Path) -> None:
    """As other processors, threads and versions round: the VAE's and the text encoder's last digits, and the pictures'
    where a node of the graph made them."""
    room.cancel()
    noise = 1e-6 * torch.randn(clip_of_a_moving_edge().shape, generator=torch.Generator().manual_seed(0))
    rounded = {"clips": clip_of_a_moving_edge() + noise, "clip": Text(off=1e-5), "vae": Pictures(off=1e-6)}
    assert room.learn(**rounded)[0] > 2
    assert room.learn() == []


def test_nothing_is_encoded_for_a_finished_training(room: Room, folder: Path) -> None:
    vae, clips = Pictures(), torch.cat([clip_of_a_moving_edge()] * 2)
    text, read = Text(), {"clip_length": FRAMES}
    room.learn(clips, text, vae, **read)
    assert vae.asked == len(clips) and text.asked == ["an edge", ""]
    assert room.learn(clips, text, vae, **read) == [] and vae.asked == len(clips)


def test_starting_over_goes_on_where_it_was_cancelled(room: Room, folder: Path) -> None:
    room.learn(steps=3)
    first = room.cancel(existing="start over")
    second = room.learn(existing="start over")
    assert second[0] > 1 and second[-1] == WIDGETS["steps"] and len(first) + len(second) >= WIDGETS["steps"]
    assert room.learn() == [], "the finished file is of the settings that were asked for"


@pytest.mark.parametrize("ending", ["", ".training"])
def test_a_damaged_file_is_named_and_starting_over_replaces_it(room: Room, folder: Path, ending: str) -> None:
    damaged = folder / f"learned.safetensors{ending}"
    damaged.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(LatentMotionError, match=rf"{damaged.name} cannot be read .* set existing to 'start over'"):
        room.learn()
    assert damaged.is_file(), "nothing is deleted unasked"
    assert room.learn(existing="start over")[-1] == WIDGETS["steps"]
    assert room.learn() == [] and [path.name for path in folder.iterdir()] == ["learned.safetensors"]


def test_a_finished_training_needs_no_state(room: Room, folder: Path) -> None:
    room.learn()
    (folder / "learned.safetensors.training").write_bytes(b"")
    assert room.learn() == []


def test_pictures_that_cannot_be_encoded_are_named(room: Room, folder: Path) -> None:
    with pytest.raises(LatentMotionError, match=r"The VAE's latents of The clip hold NaN or infinite values"):
        room.learn(vae=Pictures(off=float("nan")))
    assert not list(folder.iterdir())


def test_readers_of_another_model_are_refused_before_anything_is_read(room: Room, folder: Path) -> None:
    vae, text = Pictures(channels=16), Text(width=48)
    with pytest.raises(LatentMotionError, match="latents of 16 channels, and this MODEL takes 4"):
        room.learn(vae=vae, clip=text)
    assert not vae.asked and not text.asked
    with pytest.raises(LatentMotionError, match="gives 48 numbers a token, and this MODEL reads 32"):
        room.learn(vae=Pictures(), clip=text)


class NoPictures:
    """What Load Checkpoint gives as VAE of a file of a UNet alone."""

    first_stage_model = None


def test_a_checkpoint_without_readers_is_said(model: ModelPatcher, folder: Path) -> None:
    def runs(*readers: Any) -> Iterator[Callable]:
        given = (*readers, clip_of_a_moving_edge(), "an edge")
        yield lambda: train.train_motion_lora(model, small_module(), *given, options.lora_training(**WIDGETS))
        yield lambda: train_stages.train_domain_adapter(model, *given, options.adapter_training(**ADAPTER))
        yield lambda: train_stages.train_motion_module(model, *given, options.module_training(**MODULE))
        yield lambda: tune.tune_video_model(model, *given, options.tuning(**TUNING))

    for clip, vae, sentence in ((None, Pictures(), "no text encoder in this CLIP: .* Connect Load CLIP"),
                                (Text(), None, "no network in this VAE: .* Connect Load VAE"),
                                (Text(), NoPictures(), "no network in this VAE")):  # fmt: skip
        for run in runs(clip, vae):
            with pytest.raises(LatentMotionError, match=sentence):
                run()


VIDEO_MODELS: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "motion": lambda model: inflate(model, small_module()),
    "ST-Attention": lambda model: apply_frame_attention(model, FrameAttention()),
    "tuned": lambda model: tuned.apply_tuned(model, tuned_file(model)),
}


@pytest.mark.parametrize("kind", VIDEO_MODELS)
def test_a_model_that_makes_video_already_is_refused(model, folder, kind: str) -> None:
    video, given = VIDEO_MODELS[kind](model), (Text(), Pictures(), clip_of_a_moving_edge(), "an edge")
    runs = (
        lambda: train.train_motion_lora(video, small_module(), *given, options.lora_training(**WIDGETS)),
        lambda: train_stages.train_domain_adapter(video, *given, options.adapter_training(**ADAPTER)),
        lambda: train_stages.train_motion_module(video, *given, options.module_training(**MODULE)),
    )
    for run in runs:
        with pytest.raises(LatentMotionError, match="This MODEL makes video already"):
            run()


def test_what_other_nodes_put_around_sampling_stays_out(room: Room, folder: Path) -> None:
    """Caches and compilers, which would fail in a training or spoil it."""

    def refuse(*given: Any, **more: Any) -> None:
        raise RuntimeError("no sampling run")

    model = room.model.clone()
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        model.add_wrapper_with_key(kind, "a cache", refuse)
    assert room.learn(model=model)[-1] == WIDGETS["steps"]


def test_no_training_is_written_into_another_pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packs put folders of their own before the user's, and they go with what is in them."""
    paths.register_folders()
    packs = tmp_path / "custom_nodes"
    kind, (folders, endings) = paths.MOTION_LORAS, folder_paths.folder_names_and_paths[paths.MOTION_LORAS]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(packs)], set()))
    theirs = [str(packs / "Other" / "motion_lora"), *folders]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (theirs, endings))
    assert paths.new_file(kind, "edge") == Path(folders[0]).resolve() / "edge.safetensors"
