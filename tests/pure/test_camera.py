"""A camera that zooms, pans, tilts and rolls over stills and clips: where things go, and that no edge is seen."""

from __future__ import annotations

import math

import pytest
import torch
from latentmotion.media.clip import Clip, clip_of_images, collect_pictures
from latentmotion.motion_modules.errors import TrainingError
from latentmotion.training.camera import (
    ALIKE,
    CROP,
    CameraWork,
    Move,
    camera_clips,
    cropped,
    end_to_end,
    filmed,
    views,
)
from latentmotion.training.dataset import Dataset, film_of_parts
from torch import Tensor

FRAMES, SIZE = 6, 48


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(x: float, y: float, size: int = 96) -> Tensor:
    """A soft bright spot at this place (0..1) on grey: (1, size, size, 3)."""
    places = (torch.arange(size) + 0.5) / size
    spot = torch.exp(-((places - x) ** 2) / 0.002)[None, :] * torch.exp(-((places - y) ** 2) / 0.002)[:, None]
    return (0.3 + 0.7 * spot)[None, :, :, None].expand(1, size, size, 3).contiguous()


def path(pictures: Tensor) -> Tensor:
    """Where the spot is in every frame, x and y in 0..1: (f, 2)."""
    light = (pictures[..., 0] - 0.35).clamp(min=0)
    places = (torch.arange(pictures.shape[1]) + 0.5) / pictures.shape[1]
    total = light.sum((1, 2))
    return torch.stack(((light.sum(1) * places).sum(1) / total, (light.sum(2) * places).sum(1) / total), 1)


def still(x: float, y: float) -> Dataset:
    return Dataset((film_of_parts("still", clip_of_images(picture(x, y), 1), 0, "a spot"),))


def seen(move: Move, x: float = 0.5, y: float = 0.5, **work: object) -> Tensor:
    made = camera_clips(still(x, y), CameraWork(move, FRAMES, height=SIZE, width=SIZE, **work))
    return collect_pictures(made.films[0].clip)


@pytest.mark.parametrize(("move", "start", "way"), [
    (Move.ZOOM_IN, (0.65, 0.5), (1, 0)), (Move.ZOOM_IN, (0.5, 0.35), (0, -1)), (Move.ZOOM_OUT, (0.6, 0.5), (-1, 0)),
    (Move.PAN_RIGHT, (0.5, 0.5), (-1, 0)), (Move.PAN_LEFT, (0.5, 0.5), (1, 0)),
    (Move.TILT_DOWN, (0.5, 0.5), (0, -1)), (Move.TILT_UP, (0.5, 0.5), (0, 1)),
])  # fmt: skip
def test_the_picture_goes_the_other_way_at_every_step(move: Move, start: tuple, way: tuple) -> None:
    steps = path(seen(move, *start)).diff(dim=0)
    along = steps @ torch.tensor(way, dtype=torch.float32)
    across = steps @ torch.tensor([way[1], way[0]], dtype=torch.float32)
    assert (along > 0.01).all() and (across.abs() < 1e-3).all()


@pytest.mark.parametrize(("move", "sign"), [(Move.ROLL_CLOCKWISE, -1), (Move.ROLL_ANTICLOCKWISE, 1)])
def test_a_roll_turns_the_picture_against_the_camera(move: Move, sign: int) -> None:
    arms = path(seen(move, 0.5, 0.3)) - 0.5
    angles = torch.atan2(arms[:, 1], arms[:, 0])  # y points down: growing angles turn clockwise
    assert (sign * angles.diff() > 0.05).all()
    assert float((angles[-1] - angles[0]).abs()) == pytest.approx(0.4 * math.pi / 2, rel=0.02)


def test_a_zoom_goes_as_far_as_asked_at_an_even_pace() -> None:
    away = path(seen(Move.ZOOM_IN, 0.6, 0.5))[:, 0] - 0.5
    ratios = away[1:] / away[:-1]
    assert float(away[-1] / away[0]) == pytest.approx(1 / 0.6, rel=0.01)
    assert torch.allclose(ratios, ratios.mean(), rtol=0.01)


@pytest.mark.parametrize("aspect", [1.0, 16 / 9, 0.5])
@pytest.mark.parametrize("move", Move)
def test_no_window_leaves_the_picture(move: Move, aspect: float) -> None:
    for seed in range(8):
        windows = views(move, 9, 0.7, aspect, generator(seed))
        x, y, size, turn = windows.unbind(1)
        cosine, sine = turn.cos().abs(), turn.sin().abs()
        half_x, half_y = size / 2 * (cosine + sine / aspect), size / 2 * (cosine + sine * aspect)
        for centre, half in ((x, half_x), (y, half_y)):
            assert (centre - half > -1e-5).all() and (centre + half < 1 + 1e-5).all()


@pytest.mark.parametrize("move", ALIKE)
def test_further_clips_of_a_zoom_or_roll_make_the_same_move_in_other_parts_of_the_picture(move: Move) -> None:
    whole = views(move, FRAMES, 0.4, 1.0, generator())
    parts = [cropped(whole, generator(seed)) for seed in range(20)]
    for part in parts:
        assert torch.allclose(part[1:, 2] / part[:-1, 2], whole[1:, 2] / whole[:-1, 2])
        assert torch.equal(part[:, 3], whole[:, 3])
        assert torch.allclose(part[:, :2], part[:1, :2].expand(FRAMES, 2))
        reach = part[:, 2:3] / 2 * (part[:, 3:].cos() + part[:, 3:].sin().abs())
        assert (part[:, :2] - reach > -1e-5).all() and (part[:, :2] + reach < 1 + 1e-5).all()
        assert CROP - 1e-5 <= float(part[0, 2] / whole[0, 2]) <= 1
    assert len({tuple(part[0, :3].tolist()) for part in parts}) == len(parts)
    copies = camera_clips(still(0.5, 0.5), CameraWork(move, FRAMES, each=3, height=SIZE, width=SIZE)).films
    first, *others = (collect_pictures(film.clip) for film in copies)
    assert torch.equal(first, seen(move))
    assert all((other - first).abs().max() > 0.1 for other in others)


def test_a_window_as_large_as_the_picture_changes_nothing() -> None:
    image = torch.rand(2, 20, 30, 3, generator=generator())
    whole = torch.tensor([[0.5, 0.5, 1.0, 0.0]]).expand(2, 4)
    assert torch.allclose(filmed(image, whole, (20, 30)), image, atol=1e-4)
    assert torch.allclose(filmed(image, whole, (10, 15)),
                          image.unfold(1, 2, 2).unfold(2, 2, 2).mean((4, 5)), atol=1e-4)  # fmt: skip


def test_random_moves_differ_by_seed_and_are_the_same_again() -> None:
    first, other = (views(Move.RANDOM, 5, 0.5, 1.0, generator(seed)) for seed in (1, 2))
    assert torch.equal(first, views(Move.RANDOM, 5, 0.5, 1.0, generator(1)))
    assert (first[:, :3] - other[:, :3]).abs().max() > 0.05
    made = camera_clips(still(0.5, 0.5), CameraWork(Move.RANDOM, FRAMES, each=3))
    moved = [collect_pictures(film.clip) for film in made.films]
    assert len(moved) == 3 and not torch.allclose(moved[0], moved[1], atol=0.02)
    assert [film.captions for film in made.films] == [("a spot",)] * 3


def test_clips_go_on_while_the_camera_moves() -> None:
    """The frames of a film stay in order under the camera, from a start chosen at random."""
    shades = (torch.arange(20) / 20).view(20, 1, 1, 1).expand(20, 16, 16, 3)
    films = Dataset((film_of_parts("film", clip_of_images(shades, 8), 0, "x"),))
    made = camera_clips(films, CameraWork(Move.ZOOM_IN, FRAMES, stills=False, each=4))
    starts = set()
    for film in made.films:
        shade = collect_pictures(film.clip).mean((1, 2, 3))
        assert torch.allclose(shade.diff(), torch.full((FRAMES - 1,), 1 / 20), atol=1e-4)
        starts.add(round(float(shade[0]) * 20))
    assert len(starts) > 1
    with pytest.raises(TrainingError, match="film has 20 frames, and 21 frames need 21"):
        camera_clips(films, CameraWork(Move.ZOOM_IN, 21, stills=False))


def test_clips_of_several_sizes_are_filmed_in_one_size() -> None:
    clips = {size: clip_of_images(picture(0.5, 0.5, size).expand(FRAMES, -1, -1, -1), 1) for size in (64, 96)}
    parts = [film_of_parts(str(size), clip, 0, "a spot") for size, clip in clips.items()]
    work = CameraWork(Move.ZOOM_IN, FRAMES, stills=False, height=SIZE, width=SIZE)
    made = camera_clips(Dataset(tuple(parts)), work)
    assert [collect_pictures(film.clip).shape for film in made.films] == [(FRAMES, SIZE, SIZE, 3)] * 2


def test_a_long_still_is_made_chunk_by_chunk() -> None:
    made = camera_clips(still(0.5, 0.5), CameraWork(Move.PAN_LEFT, 40, each=2))
    assert max(len(chunk) for chunk in made.films[0].clip.chunks()) <= 16
    whole = end_to_end(made)
    assert isinstance(whole, Clip) and collect_pictures(whole).shape == (80, 96, 96, 3)


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_an_amount_that_is_no_share_is_refused(amount: float) -> None:
    with pytest.raises(TrainingError, match="between 0 and 1"):
        CameraWork(Move.ZOOM_IN, amount=amount)
