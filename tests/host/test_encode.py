"""A film becomes the same latents however much memory there is, also where the host's own node would use tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from helpers_motion import relative_error
from helpers_vae import image_vae, svd_vae, vidrd_vae
from latentmotion.host.encode import encode_frames, encode_video
from latentmotion.host.video import StreamedVideo
from latentmotion.media.clip import Clip, clip_of_images
from latentmotion.motion_modules.errors import ModelMismatchError
from test_decode import out_of_memory
from torch import Tensor

FRAMES = 5
VAES = {"images": image_vae, "svd": svd_vae, "vidrd": vidrd_vae}


def film(height: int = 24, width: int = 16, frames: int = FRAMES) -> Clip:
    """Pictures whose brightness is not the same everywhere; larger ones are enlarged."""
    small = torch.rand(frames, 3, 3, 2, generator=torch.Generator().manual_seed(0)) ** 3
    pictures = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return clip_of_images(pictures.movedim(1, -1), Fraction(8))


def pictures_of(clip: Clip) -> Tensor:
    return torch.cat(list(clip.chunks()))


@pytest.fixture(params=VAES)
def vae(request: pytest.FixtureRequest) -> comfy.sd.VAE:
    return VAES[request.param]()


def refusing(vae: comfy.sd.VAE, refuse: Callable[[Tensor], Any]) -> tuple[list[int], Any]:
    """Until the handle is removed, the encoder runs out of memory for some inputs; the numbers of pictures it saw."""
    seen: list[int] = []

    def check(x: Tensor) -> Any:
        seen.append(len(x))
        return refuse(x)

    return seen, out_of_memory(vae.first_stage_model.encoder.mid.attn_1, check)


@pytest.mark.parametrize("at_once", [1, 2, 4, 99])
def test_it_is_the_hosts_own_encoding(vae: comfy.sd.VAE, at_once: int) -> None:
    made, expected = encode_frames(vae, film(27, 18), at_once), vae.encode(pictures_of(film(27, 18)))
    assert relative_error(made, expected) < 1e-5 and expected.std() > 0.05
    assert made.dtype == torch.float32 and made.device.type == "cpu" and not made.is_inference()


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: not enough memory")], ids=["GPU", "CPU"])
def test_out_of_memory_means_fewer_pictures_at_once(
    vae: comfy.sd.VAE, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    expected, seen = encode_frames(vae, film(), 4), []
    handle = out_of_memory(vae.first_stage_model.encoder.mid.attn_1, lambda x: seen.append(len(x)) or len(x) > 1, error)
    try:
        assert relative_error(encode_frames(vae, film(), 4), expected) < 1e-5
    finally:
        handle.remove()
    assert seen == [4, 2, 1, 1, 1, 1, 1]
    assert [record.message for record in caplog.records if "Out of memory" in record.message] == [
        "Out of memory while encoding; going on with fewer pictures at once. The latents stay the same, it takes a "
        "little longer."
    ]


def test_one_failed_call_is_one_repeated_call() -> None:
    """The pictures before it are not encoded again; for frames this large the host's node would have used tiles."""
    vae, large = image_vae(), film(16, 288, 4)
    expected, calls = encode_frames(vae, large, 2), []
    ways = {"ours": lambda: encode_frames(vae, large, 2), "the host's": lambda: vae.encode(pictures_of(large))}
    errors = {}
    for name, again in ways.items():
        calls.clear()
        seen, handle = refusing(vae, lambda x: calls.append(1) or len(calls) == 1)
        try:
            errors[name] = relative_error(again(), expected)
        finally:
            handle.remove()
        assert name != "ours" or seen == [2, 1, 1, 1, 1]
    assert errors["ours"] < 1e-3 < 1e-2 < errors["the host's"]


def test_tiles_are_for_the_whole_film(caplog: pytest.LogCaptureFixture) -> None:
    """One picture in the middle does not fit, and is no other shade than its neighbours."""
    vae, large, calls = image_vae(), film(16, 288), []
    _, handle = refusing(vae, lambda x: calls.append(1) or len(calls) == 3)
    try:
        made = encode_frames(vae, large, 1)
    finally:
        handle.remove()
    tiled = torch.cat([vae.encode_tiled(picture) for picture in pictures_of(large).split(1)])
    assert all(relative_error(found, picture) < 1e-3 for found, picture in zip(made, tiled, strict=True))
    assert relative_error(made, encode_frames(vae, large, 1)) > 1e-2
    assert "encoded in tiles" in caplog.text


@pytest.mark.parametrize("error", [comfy.model_management.OOM_EXCEPTION("injected"), ValueError("broken")])
def test_what_never_fits_or_is_broken_ends_in_that_error(error: Exception) -> None:
    vae = image_vae()
    handle = out_of_memory(vae.first_stage_model.encoder.mid.attn_1, lambda x: True, error)
    try:
        with pytest.raises(type(error), match=str(error)):
            encode_frames(vae, film(), 2)
    finally:
        handle.remove()


def test_cancel_answers_between_two_calls() -> None:
    vae = image_vae()
    stop = comfy.model_management.interrupt_current_processing
    seen, handle = refusing(vae, lambda x: stop())
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            encode_frames(vae, film(), 1)
    finally:
        handle.remove()
    assert seen == [1]


def test_the_node_takes_videos_and_images_and_shows_how_far_it_is(vae: comfy.sd.VAE, run_node: Callable) -> None:
    clip, shares = film(27, 18, frames=40), []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: shares.append(value / total))
    try:
        of_video = run_node("LatentMotionTemporalVAEEncode", video=StreamedVideo(clip), vae=vae)[0]["samples"]
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert shares == sorted(shares) and shares[-1] == 1.0
    of_images = run_node("LatentMotionTemporalVAEEncode", video=pictures_of(clip), vae=vae)[0]["samples"]
    expected = vae.encode(pictures_of(clip))
    assert relative_error(of_video, expected) < 3e-5 and relative_error(of_images, expected) < 3e-5


def test_the_node_holds_a_few_pictures_of_a_video_at_a_time(run_node: Callable) -> None:
    alive: list[int] = []
    held: WeakSet[Tensor] = WeakSet()

    def chunks() -> Iterator[Tensor]:
        for chunk in film(24, 16, frames=96).chunks():
            for part in chunk.split(8):
                part = part.clone()
                held.add(part)
                alive.append(len(held))
                yield part

    video = StreamedVideo(replace(film(24, 16, frames=96), chunks=chunks))
    made = run_node("LatentMotionTemporalVAEEncode", video=video, vae=image_vae())[0]["samples"]
    assert len(made) == 96 and len(alive) == 12 and max(alive) <= 2


def test_a_vae_with_a_time_axis_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match="This VAE has its own time axis"):
        encode_video(SimpleNamespace(latent_dim=3), pictures_of(film()))
