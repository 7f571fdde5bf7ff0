"""Folders of captioned videos: what is read, what is found in them, and the sentence for what cannot be used."""

from __future__ import annotations

from pathlib import Path

import films
import numpy as np
import pytest
import torch
from latentmotion.media.clip import Clip, clip_of_images, collect_pictures
from latentmotion.media.errors import VideoError
from latentmotion.media.geometry import Frame
from latentmotion.media.shots import shots
from latentmotion.media.timing import Selection
from latentmotion.motion_modules.errors import TrainingError
from latentmotion.training.dataset import Dataset, film_of_parts, join, with_mirrored
from latentmotion.training.folder import Reading, read_folder
from PIL import Image

STAMPS = [100 * i for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two films and a picture, one film and the picture in a folder of their own."""
    (tmp_path / "more").mkdir()
    films.grey_film(tmp_path / "a.mp4", STAMPS)
    films.grey_film(tmp_path / "more" / "b.mp4", STAMPS[:5])
    Image.fromarray(np.full((32, 64, 3), 200, np.uint8)).save(tmp_path / "more" / "c.png")
    return tmp_path


def scene(colour: tuple[float, float, float], frames: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """A bright square that crosses a noisy ground of this colour: (frames, size, size, 3)."""
    noise = torch.rand(frames, size, size, 3, generator=torch.Generator().manual_seed(seed))
    pictures = torch.tensor(colour) * 0.8 + 0.1 * noise
    for number in range(frames):
        left = number * (size - 8) // max(1, frames - 1)
        pictures[number, 12:20, left : left + 8] = 1.0
    return pictures


def as_clip(*parts: torch.Tensor) -> Clip:
    return clip_of_images(torch.cat(parts), 24)


def test_captions_come_from_texts_then_the_table_then_the_node(folder: Path) -> None:
    (folder / "a.txt").write_text("a grey room\nthat brightens\n", encoding="utf-8")
    (folder / "captions.csv").write_text('caption,file\n"a room, again",more/b.mp4\nnot read,a.mp4\nno file,z.mp4\n')
    dataset = read_folder(folder, Reading(caption="anything"))
    assert [(film.name, film.captions) for film in dataset.films] == [
        ("a.mp4", ("a grey room that brightens",)), ("more/b.mp4", ("a room, again",)), ("more/c.png", ("anything",)),
    ]  # fmt: skip
    assert [film.clip.frames for film in dataset.films] == [12, 5, 1]
    assert "more/b.mp4: 0.00 s to 0.50 s, 5 frames of 64 x 32, 10 a second: a room, again" in dataset.table()


def test_a_table_without_a_head_is_read_by_its_columns(folder: Path) -> None:
    (folder / "t.csv").write_text("a,first\nb,second\nc,third\n")
    assert [film.captions for film in read_folder(folder, Reading()).films] == [("first",), ("second",), ("third",)]


def test_pictures_come_in_the_size_and_rate_asked_for(folder: Path) -> None:
    dataset = read_folder(folder, Reading(Selection(frame_rate=5), Frame(16, 16), "x"))
    assert [collect_pictures(film.clip).shape for film in dataset.films] == [(6, 16, 16, 3), (2, 16, 16, 3),
                                                                            (1, 16, 16, 3)]  # fmt: skip


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "a.txt").write_text("there")
    with pytest.raises(TrainingError, match=r"2 of the 3 videos in .*: more/b.mp4, more/c.png\. .*more/b.txt"):
        read_folder(folder, Reading())


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("x.csv", b"a.mp4;one\n", "row 1 has fewer than two columns"),
    ("a.txt", "größer".encode("latin-1"), "cannot be read as text"),
    ("cut.mp4", b"\0\0\0\x18ftypmp42" + bytes(40), r"^cut.mp4"),
    ("cut.png", b"\x89PNG\r\n", r"^cut.png cannot be read as a picture"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(folder: Path, name: str, content: bytes, sentence: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises((TrainingError, VideoError), match=sentence):
        read_folder(folder, Reading(caption="x"))


def test_two_tables_are_one_too_many(folder: Path) -> None:
    for name in ("x.csv", "y.csv"):
        (folder / name).write_text("a,b\n")
    with pytest.raises(TrainingError, match=r"2 CSV files .*x.csv, y.csv"):
        read_folder(folder, Reading(caption="x"))


def test_a_folder_without_videos_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="There is no video in the folder"):
        read_folder(tmp_path, Reading())
    with pytest.raises(TrainingError, match="There is no folder"):
        read_folder(tmp_path / "not", Reading())


def test_shots_end_where_the_colours_change_at_once() -> None:
    parts = [scene((0.9, 0.2, 0.2), 20), scene((0.2, 0.3, 0.9), 13, seed=1), scene((0.2, 0.8, 0.2), 30, seed=2)]
    assert shots(as_clip(*parts)) == (20, 13, 30)
    assert shots(as_clip(*parts), threshold=1.0) == (63,)
    assert shots(as_clip(parts[0][:1])) == (1,)


def test_motion_flashes_and_slow_light_are_no_cuts() -> None:
    flash = scene((0.9, 0.2, 0.2), 20)
    flash[9] = 1.0
    assert shots(as_clip(flash)) == (20,)
    dimmed = scene((0.9, 0.9, 0.9), 40) * torch.linspace(1, 0.1, 40).view(-1, 1, 1, 1)
    assert shots(as_clip(dimmed)) == (40,)
    wide = torch.rand(1, 32, 400, 3, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.interpolate(wide.movedim(3, 1)[..., :40], (32, 400)).movedim(1, 3)
    pan = torch.cat([wide[:, :, 4 * i : 4 * i + 64] for i in range(40)])
    assert shots(as_clip(pan)) == (40,)


def test_shots_shorter_than_asked_are_joined() -> None:
    quick = [scene((0.9, 0.2, 0.2), 20), scene((0.2, 0.3, 0.9), 4), scene((0.2, 0.8, 0.2), 20)]
    assert shots(as_clip(*quick), shortest=8) == (20, 24)


def test_a_long_video_is_split_before_it_is_captioned(tmp_path: Path) -> None:
    pictures = torch.cat([scene((0.9, 0.2, 0.2), 20, 64), scene((0.2, 0.3, 0.9), 12, 64)])
    films.film_of(tmp_path / "long.mp4", pictures)
    split = Reading(split=True)
    (tmp_path / "long.txt").write_text("a\nb\nc")
    with pytest.raises(TrainingError, match=r"long.mp4 has 2 shots and 3 captions.* at frame 0, 20\."):
        read_folder(tmp_path, split)
    (tmp_path / "long.txt").write_text("red ground\nblue ground")
    dataset = read_folder(tmp_path, split)
    assert [(piece.start, piece.frames, piece.caption) for piece in dataset.pieces()] == [
        (0, 20, "red ground"), (20, 12, "blue ground")]  # fmt: skip
    assert [piece.start for piece in dataset.usable(16, 1)] == [0], "shots that are too short are left out"
    with pytest.raises(TrainingError, match=r"None of the 2 shots .* longest has 20 frames, and 16 .* need 31"):
        dataset.usable(16, 2)


def test_a_video_that_is_too_short_is_said_before_anything_is_decoded(folder: Path) -> None:
    dataset = read_folder(folder, Reading(caption="x"))
    with pytest.raises(TrainingError, match=r"more/b.mp4 has 5 frames, and 4 frames with a stride of 2 need 7\. 1 "
                       "other clip is too short as well"):  # fmt: skip
        dataset.usable(4, 2)
    assert len(dataset.usable(1, 1)) == 3


def test_videos_of_several_sizes_are_refused() -> None:
    small, large = (film_of_parts(f"{size}", as_clip(torch.zeros(2, size, size, 3)), 0, "x") for size in (16, 32))
    with pytest.raises(TrainingError, match=r"differ in size: 16 is 16 x 16 and 32 32 x 32"):
        join(Dataset((small,)), Dataset((large,))).usable(1, 1)


def test_parts_of_a_clip_have_their_captions() -> None:
    film = film_of_parts("clips", as_clip(torch.zeros(6, 8, 8, 3)), 3, "one\ntwo")
    assert [(piece.start, piece.caption) for piece in film.pieces()] == [(0, "one"), (3, "two")]


@pytest.mark.parametrize(("length", "text", "sentence"), [
    (4, "one", "no whole number of clips of 4"),
    (3, "  \n ", "no caption"),
    (2, "one\ntwo", "3 clips and 2 captions"),
])  # fmt: skip
def test_what_cannot_be_cut_is_said(length: int, text: str, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        film_of_parts("clips", as_clip(torch.zeros(6, 8, 8, 3)), length, text)


def test_mirrored_films_come_after_the_others_and_have_latents_of_their_own(folder: Path) -> None:
    plain = read_folder(folder, Reading(caption="a room"))
    both = with_mirrored(plain)
    assert [film.name for film in both.films] == [
        "a.mp4", "more/b.mp4", "more/c.png", "a.mp4 mirrored", "more/b.mp4 mirrored", "more/c.png mirrored",
    ]  # fmt: skip
    assert len({film.mark for film in both.films}) == 6 and both.films[3].captions == ("a room",)
    picture = scene((0.2, 0.4, 0.6), 4)
    made = with_mirrored(Dataset((film_of_parts("drawn", as_clip(picture), 2, "one\ntwo"),)))
    assert [piece.caption for piece in made.pieces()] == ["one", "two", "one", "two"]
    assert torch.equal(collect_pictures(made.films[1].clip), picture.flip(2)) and not made.films[1].mark
