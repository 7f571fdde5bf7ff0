"""Datasets of the graph: folders and clips become latents piece by piece, and the training nodes take them."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from helpers_train import WIDGETS, Pictures, Text, small_module
from latentmotion.host import dataset as data
from latentmotion.host import material, options, train
from latentmotion.host.video import StreamedVideo
from latentmotion.media.clip import Clip, clip_of_images
from latentmotion.motion_modules.errors import LatentMotionError
from latentmotion.nodes.dataset import LoadVideoDataset
from PIL import Image
from small_disk import small_disk
from torch import Tensor

pytest_plugins = ["helpers_train_fixtures"]

SIZE = 32
LOADED = {"caption": "", "frame_rate": 0.0, "width": SIZE, "height": SIZE, "fit": "crop", "split_shots": False,
          "shot_threshold": 0.3, "frame_cap": 0}  # fmt: skip


def pictures(frames: int, colour: float = 0.5) -> Tensor:
    ramp = torch.linspace(0, 1, frames).view(-1, 1, 1, 1)
    return (ramp * colour).expand(frames, SIZE, SIZE, 3).contiguous()


@pytest.fixture
def videos(base_directory: Path) -> Path:
    """A folder of the input folder with two animated pictures and their captions."""
    folder = Path(folder_paths.get_input_directory(), "videos")
    folder.mkdir(exist_ok=True)
    for name, frames in (("a", 6), ("b", 9)):
        shots = [Image.fromarray((picture * 255).byte().numpy()) for picture in pictures(frames)]
        shots[0].save(folder / f"{name}.gif", save_all=True, append_images=shots[1:], duration=100)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    return folder


def test_the_node_reads_a_folder_and_training_takes_it(videos, model, folder, run_node, monkeypatch):
    dataset, table = run_node("LatentMotionLoadVideoDataset", folder="videos", **LOADED)
    assert [(piece.frames, piece.caption) for piece in dataset.pieces()] == [(6, "clip a"), (9, "clip b")]
    assert table.splitlines()[1].endswith("9 frames of 32 x 32, 10 a second: clip b")
    text, how = Text(), options.lora_training(**WIDGETS | {"steps": 1})
    train.train_motion_lora(model, small_module(), text, Pictures(), dataset, "", how)
    assert text.asked == ["clip a", "clip b", ""]
    assert (folder / "learned.safetensors").is_file()


def test_the_clips_of_the_pack_have_a_name(videos, run_node):
    """So that the shipped workflow runs where the input folder is empty; a folder of the user's goes before."""
    assert LoadVideoDataset.validate_inputs(data.DEMO_FOLDER) is True
    dataset, _ = run_node("LatentMotionLoadVideoDataset", folder=data.DEMO_FOLDER, **LOADED | {"caption": "a circle"})
    assert [(film.name, film.caption) for film in dataset.pieces()] == [("latentmotion_toy_clip.mp4", "a circle")]
    own = videos.with_name(data.DEMO_FOLDER)
    videos.rename(own)
    try:
        dataset, _ = run_node("LatentMotionLoadVideoDataset", folder=data.DEMO_FOLDER, **LOADED)
    finally:
        own.rename(videos)
    assert [piece.caption for piece in dataset.pieces()] == ["clip a", "clip b"]


def test_mirrored_videos_are_asked_for(videos, run_node):
    plain, both = (run_node("LatentMotionLoadVideoDataset", folder="videos", **LOADED | mirror)[0]
                   for mirror in ({}, {"mirror": True}))  # fmt: skip
    assert len(plain.films) == 2 and [film.name for film in both.films[2:]] == ["a.gif mirrored", "b.gif mirrored"]


def test_the_folder_is_checked_before_anything_runs(videos):
    assert LoadVideoDataset.validate_inputs("videos") is True and LoadVideoDataset.validate_inputs(None) is True
    assert LoadVideoDataset.validate_inputs(str(videos)) is True
    assert "There is no folder" in LoadVideoDataset.validate_inputs("not there")
    assert "No folder is named" in LoadVideoDataset.validate_inputs(" ")


def test_a_changed_caption_is_noticed(videos):
    before = LoadVideoDataset.fingerprint_inputs("videos")
    assert LoadVideoDataset.fingerprint_inputs("videos") == before
    os.utime(videos / "a.txt", (1, 1))
    assert LoadVideoDataset.fingerprint_inputs("videos") != before


def test_clips_of_the_graph_are_put_behind_each_other(run_node):
    video = StreamedVideo(clip_of_images(pictures(3), Fraction(8)))
    (first,) = run_node("LatentMotionCollectClips", clips=pictures(8), captions="one\ntwo", clip_length=4)
    (both,) = run_node("LatentMotionCollectClips", clips=video, captions="three", clip_length=0, dataset=first)
    assert [(piece.start, piece.frames, piece.caption) for piece in both.pieces()] == [
        (0, 4, "one"), (4, 4, "two"), (0, 3, "three")]  # fmt: skip
    (joined,) = run_node("LatentMotionCollectClips", clips=first, captions="", clip_length=0, dataset=both)
    assert len(first.pieces()) == 2 and len(joined.pieces()) == 5


def test_a_film_is_encoded_once_and_never_held(monkeypatch):
    """Two parts of one film, decoded in chunks of which one is alive at a time."""
    alive, most, passes = 0, 0, 0

    class Chunk:
        def __init__(self, number: int) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            self.pictures = torch.full((2, SIZE, SIZE, 3), number / 4)

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, places: slice) -> Tensor:
            return self.pictures[places].clone()

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def chunks():
        nonlocal passes
        passes += 1
        for number in range(4):
            yield Chunk(number)

    class Format:
        process_latent_in = staticmethod(lambda latent: latent)

    class Model:
        model = Format

    film = StreamedVideo(Clip(8, SIZE, SIZE, Fraction(8), chunks))
    dataset = data.collect(film, "one\ntwo", 4)
    clips = data.as_latents(dataset, 3, 1, lambda clip: material.encode_pictures(Model, Pictures(), clip))
    assert passes == 1 and most <= 2
    assert [len(latents) for latents in clips.latents] == [4, 4] and clips.captions == ("one", "two")
    assert clips.latents[1].mean() > clips.latents[0].mean()


def test_latents_that_do_not_fit_on_the_disk_are_not_kept(videos, folder, run_node, caplog):
    shelf = data.Shelf(folder / "latents", "stamp")
    dataset, _ = run_node("LatentMotionLoadVideoDataset", folder="videos", **LOADED)
    with small_disk(1000):
        clips = data.as_latents(dataset, 4, 1, lambda clip: torch.ones(clip.frames, 4, 8, 8), shelf)
    assert [len(latents) for latents in clips.latents] == [6, 9]
    assert "The latents of a.gif cannot be kept" in caplog.text and not list((folder / "latents").iterdir())
    data.as_latents(dataset, 4, 1, lambda clip: torch.ones(clip.frames, 4, 8, 8), shelf)
    kept = list((folder / "latents").iterdir())
    assert len(kept) == 2 and not folder_paths.filter_files_extensions(
        [path.name for path in kept], folder_paths.supported_pt_extensions), "they are no models to choose from"


def test_damaged_latents_are_encoded_again(videos, folder, run_node, caplog):
    shelf = data.Shelf(folder / "latents", "stamp")
    dataset, _ = run_node("LatentMotionLoadVideoDataset", folder="videos", **LOADED)
    encoded = []

    def read() -> tuple[Tensor, ...]:
        def encode(clip: Clip) -> Tensor:
            encoded.append(clip.frames)
            return torch.full((clip.frames, 4, 8, 8), float(clip.frames))

        return data.as_latents(dataset, 4, 1, encode, shelf).latents

    whole = read()
    for path, size in zip(sorted((folder / "latents").iterdir()), (0, 100), strict=True):
        path.write_bytes(path.read_bytes()[:size])
    assert all(torch.equal(*pair) for pair in zip(read(), whole, strict=True)) and encoded == [6, 9, 6, 9]
    assert "a.gif is encoded again" in caplog.text
    read()
    assert len(encoded) == 4, "the files are whole again"


def test_nothing_is_encoded_where_a_clip_is_too_short():
    dataset = data.collect(pictures(4), "x", 0, data.collect(pictures(9), "x", 0))
    with pytest.raises(LatentMotionError, match=r"has 4 frames, and 4 frames with a stride of 2 need 7"):
        data.as_latents(dataset, 4, 2, lambda clip: pytest.fail("a clip was encoded"))


def test_captions_are_not_given_twice():
    dataset = data.collect(pictures(4), "x", 0)
    assert data.dataset_of(dataset, " ") is dataset
    with pytest.raises(LatentMotionError, match="brings its captions"):
        data.dataset_of(dataset, "y")


def test_cancel_is_answered_while_shots_are_looked_for(videos, run_node: Callable):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node("LatentMotionLoadVideoDataset", folder="videos", **LOADED | {"split_shots": True})


CAMERA = {"motion": "pan left", "source": "stills", "frames": 5, "amount": 0.4, "clips_each": 2, "width": 16,
          "height": 16, "seed": 0}  # fmt: skip


def test_a_camera_films_every_image_and_training_takes_the_clips(model, folder, run_node):
    dataset, video = run_node("LatentMotionCameraMotionClips", clips=pictures(3), captions="a\nb\nc", **CAMERA)
    assert [piece.caption for piece in dataset.pieces()] == ["a", "a", "b", "b", "c", "c"]
    assert (video.get_frame_count(), video.get_dimensions()) == (30, (16, 16))
    assert video.get_components().images.shape == (30, 16, 16, 3)
    how = options.lora_training(**WIDGETS | {"steps": 1, "frames": 5, "file_name": "pan"})
    train.train_motion_lora(model, small_module(), Text(), Pictures(), dataset, "", how)
    assert (folder / "pan.safetensors").is_file()


def test_a_camera_over_a_video_takes_its_pictures_or_follows_it(run_node):
    video = StreamedVideo(clip_of_images(pictures(9), Fraction(8)))
    for source, still in (("stills", True), ("clips", False)):
        settings = CAMERA | {"motion": "zoom in", "source": source}
        dataset, _ = run_node("LatentMotionCameraMotionClips", clips=video, captions="x", **settings)
        shades = next(dataset.films[0].clip.chunks()).mean((1, 2, 3))
        assert len(dataset.films) == 2 and (bool((shades.diff().abs() < 1e-4).all()) is still)


def test_a_camera_over_pictures_of_two_sizes_asks_for_one():
    both = data.collect(torch.rand(1, 48, 32, 3), "y", 0, data.collect(torch.rand(1, 32, 48, 3), "x", 0))
    with pytest.raises(LatentMotionError, match=r"The clip pan left 1 is 48 x 32 and The clip pan left 1 32 x 48. Set "
                       "width and height on Camera Motion Clips"):  # fmt: skip
        data.film_camera(both, "", **CAMERA | {"width": 0, "height": 0})
    _, video = data.film_camera(both, "", **CAMERA)
    assert video.get_components().images.shape == (20, 16, 16, 3)


def test_a_camera_names_choices_it_does_not_know():
    with pytest.raises(ValueError, match="motion is 'fly', which is not one of its choices: zoom in"):
        data.film_camera(pictures(1), "x", **CAMERA | {"motion": "fly"})
