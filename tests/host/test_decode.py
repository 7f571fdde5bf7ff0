"""Temporal VAE Decode against one call of the host's decoder on the whole clip."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from helpers_vae import clip, image_vae, svd_vae, vidrd_vae, whole
from latentmotion.bench.side_by_side import peak_bytes
from latentmotion.host import memory
from latentmotion.host import vae as host_vae
from latentmotion.host.vae import EXACT, STREAMING, ClipDecoder, DecodeSettings
from latentmotion.motion_modules.errors import ClipError, ModelMismatchError
from latentmotion.motion_modules.temporal_vae import decode
from torch import Tensor, nn

FRAMES = 8
SURVEYED = 5
LONG = SURVEYED + 4
VAES = {"svd": svd_vae, "vidrd": vidrd_vae}


@pytest.fixture(scope="module", autouse=True)
def short_survey() -> Iterator[None]:
    """Streaming begins with clips of six frames, so that the tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "SURVEY_FRAMES", SURVEYED)
        yield


@pytest.fixture(scope="module", params=VAES)
def vae(request: pytest.FixtureRequest) -> comfy.sd.VAE:
    return VAES[request.param]()


@pytest.fixture(scope="module")
def svd() -> comfy.sd.VAE:
    return svd_vae()


def decoded(vae: comfy.sd.VAE, latent: Tensor, mode: str = EXACT, chunk: int = 3, clip_length: int = 0) -> Tensor:
    """All chunks, each of the promised form."""
    chunks = list(ClipDecoder(vae, DecodeSettings(mode, chunk, clip_length)).frames(latent))
    assert all(0 < len(part) <= chunk for part in chunks)
    assert all(part.dtype == torch.float32 and part.device.type == "cpu" for part in chunks)
    return torch.cat(chunks)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert expected.std() > 0.05 and (expected[1:] - expected[:-1]).abs().mean() > 0.01, "the clip must move"
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, FRAMES])
def test_exact_is_one_call_of_the_hosts_decoder(vae: comfy.sd.VAE, chunk: int) -> None:
    latent = clip(FRAMES)
    assert_same(decoded(vae, latent, EXACT, chunk), whole(vae, latent))


def test_chunks_of_the_host_are_not_the_whole_clip(vae: comfy.sd.VAE) -> None:
    """What the node is for: the host's own way to save memory changes the pixels."""
    latent = clip(FRAMES)
    parts = torch.cat([whole(vae, part) for part in latent.split(4)])
    assert (parts - whole(vae, latent)).abs().max() > 0.02


@pytest.mark.parametrize("chunk", [2, 7, LONG])
def test_streaming_gives_the_same_pixels_for_every_chunk(vae: comfy.sd.VAE, chunk: int) -> None:
    latent = clip(LONG)
    one = decoded(vae, latent, STREAMING, 1)
    assert_same(decoded(vae, latent, STREAMING, chunk), one)
    expected = whole(vae, latent)
    cut = torch.cat([whole(vae, part) for part in latent.split(SURVEYED)])
    assert 1e-4 < (one - expected).abs().mean() < (cut - expected).abs().mean(), "closer than pieces as long"


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
def test_one_frame(vae: comfy.sd.VAE, mode: str) -> None:
    latent = clip(1)
    torch.testing.assert_close(decoded(vae, latent, mode), whole(vae, latent), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
def test_clips_of_a_batch_do_not_leak(vae: comfy.sd.VAE, mode: str) -> None:
    length = LONG if mode == STREAMING else 5
    first, second = clip(length), 3 * clip(length, seed=1)
    both = decoded(vae, torch.cat((first, second)), mode, clip_length=length)
    assert torch.equal(both, torch.cat([decoded(vae, latent, mode) for latent in (first, second)]))
    assert not torch.equal(both, decoded(vae, torch.cat((first, second)), mode))


def test_bfloat16() -> None:
    vae, latent = svd_vae(dtype=torch.bfloat16), clip(FRAMES)
    found, expected = decoded(vae, latent), whole(vae, latent)
    assert (found - expected).abs().mean() < 5e-3 and (found - expected).abs().max() < 0.06


def test_weights_are_fetched_as_the_host_casts_them(svd: comfy.sd.VAE) -> None:
    """With its casting layers, as for a model that is only partly on the device."""
    latent = clip(FRAMES)
    expected = decoded(svd, latent)
    layers = [layer for layer in svd.first_stage_model.modules() if hasattr(layer, "comfy_cast_weights")]
    try:
        for layer in layers:
            layer.comfy_cast_weights = True
        assert torch.equal(decoded(svd, latent), expected)
    finally:
        for layer in layers:
            layer.comfy_cast_weights = False


def test_image_vae_decodes_frame_by_frame() -> None:
    vae, latent = image_vae(), clip(5)
    decoder = ClipDecoder(vae, DecodeSettings(chunk=2))
    assert not decoder.is_temporal
    torch.testing.assert_close(torch.cat(list(decoder.frames(latent))), vae.decode(latent), rtol=1e-5, atol=1e-5)


def test_streaming_memory_does_not_grow_with_the_clip(svd: comfy.sd.VAE) -> None:
    def peak(frames: int) -> int:
        latent = clip(frames)

        def run() -> None:
            for _ in ClipDecoder(svd, DecodeSettings(STREAMING, 4)).frames(latent):
                pass

        return peak_bytes(run)

    assert peak(LONG + 34) < 1.02 * peak(LONG + 24)


def test_size_is_known_and_nothing_computed_beforehand(svd: comfy.sd.VAE) -> None:
    calls = []
    handle = svd.first_stage_model.decoder.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        decoder = ClipDecoder(svd)
        assert decoder.size(clip(5)) == (5, 24, 16)
        frames = decoder.frames(clip(5))
        assert not calls
        assert next(frames).shape[1:] == (24, 16, 3) and calls
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
def test_cancel_and_unloading_between_chunks(svd: comfy.sd.VAE, mode: str) -> None:
    latent = clip(LONG)
    expected = decoded(svd, latent, mode, 2)
    frames = ClipDecoder(svd, DecodeSettings(mode, 2)).frames(latent)
    first = next(frames)
    comfy.model_management.unload_all_models()
    assert torch.equal(torch.cat((first, next(frames))), expected[: 2 * len(first)])
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        next(frames)


def out_of_memory(layer: nn.Module, refuse: Callable[[Tensor], bool], error: Exception | None = None) -> Any:
    """Until the handle is removed, `layer` runs out of memory for some inputs."""

    def check(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if refuse(inputs[0]):
            raise error or comfy.model_management.OOM_EXCEPTION("injected: out of memory")

    return layer.register_forward_pre_hook(check)


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: not enough memory")], ids=["GPU", "CPU"])
def test_out_of_memory_means_fewer_frames_at_once(
    svd: comfy.sd.VAE, mode: str, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The user is told once, although eight frames become four and then two."""
    latent = clip(LONG)
    expected = decoded(svd, latent, mode)
    handle = out_of_memory(svd.first_stage_model.decoder.mid.attn_1, lambda x: len(x) > 2, error)
    try:
        assert_same(decoded(svd, latent, mode, 8), expected)
    finally:
        handle.remove()
    assert sum("Out of memory while decoding" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
def test_free_memory_chooses_the_chunk_and_no_pixel(
    svd: comfy.sd.VAE, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latent = clip(LONG)
    expected = decoded(svd, latent, mode, 8)
    decoder = ClipDecoder(svd, DecodeSettings(mode, 8))
    for frames in (8, 2, 1):
        room = decoder.bytes_needed(latent, frames)
        monkeypatch.setattr(memory, "_free", lambda device, room=room: (room + 5, 5))
        with caplog.at_level(logging.INFO):
            chunks = list(decoder.frames(latent))
        assert_same(torch.cat(chunks), expected)
        assert max(map(len, chunks)) <= frames
        assert re.search(rf"decoding {frames} frames? at once, about \d+ MiB of \d+ MiB free", caplog.text)


def test_a_vae_for_images_gets_fewer_frames_too(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latent = image_vae(), clip(5)
    expected = vae.decode(latent)
    one = ClipDecoder(vae).bytes_needed(latent, 1)
    monkeypatch.setattr(memory, "_free", lambda device: (3.5 * one, 0))
    chunks = list(ClipDecoder(vae).frames(latent))
    assert [len(part) for part in chunks] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-5, atol=1e-5)


def test_encoding_gives_the_same_however_it_is_cut(vae: comfy.sd.VAE) -> None:
    """Why there is no node for it: the encoders look at one frame at a time."""
    pictures = torch.rand(5, 24, 16, 3, generator=torch.Generator().manual_seed(0))
    whole, single = vae.encode(pictures), torch.cat([vae.encode(picture[None]) for picture in pictures])
    assert whole.std() > 0.05
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)


def test_out_of_memory_in_the_middle_of_a_clip(svd: comfy.sd.VAE) -> None:
    """Frames that were given out are not given out again."""
    latent, calls = clip(FRAMES), []
    expected = decoded(svd, latent)
    frames = ClipDecoder(svd, DecodeSettings(EXACT, 4)).frames(latent)
    first = next(frames)
    handle = out_of_memory(svd.first_stage_model.decoder.norm_out, lambda x: calls.append(1) or len(calls) == 1)
    try:
        assert_same(torch.cat((first, *frames)), expected)
        assert calls
    finally:
        handle.remove()


def wide_clip(frames: int) -> Tensor:
    """Latents wider than the largest tile."""
    return nn.functional.interpolate(clip(frames, height=1, width=4), size=(2, 72), mode="bilinear")


def test_tiles_have_no_seams(svd: comfy.sd.VAE) -> None:
    """A frame too large for the memory: no step at the edge of a tile, all frames of a tile agree."""
    latent = wide_clip(2)
    plain = decoded(svd, latent)
    handle = out_of_memory(svd.first_stage_model.decoder.mid.attn_1, lambda x: x.shape[-1] > 64)
    try:
        found = decoded(svd, latent)
    finally:
        handle.remove()
    assert not torch.equal(found, plain)
    steps = [(part[:, :, 1:] - part[:, :, :-1]).abs().amax(dim=(0, 1, 3)) for part in (found, plain)]
    assert steps[0].max() < 1.1 * steps[1].max()
    assert (found - plain).abs().mean() < 0.06


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
def test_no_tiles_in_the_middle_of_a_clip(svd: comfy.sd.VAE, mode: str) -> None:
    """Their brightness is another one, so that free memory would put a step into the clip."""
    latent = wide_clip(SURVEYED + 1)
    frames = ClipDecoder(svd, DecodeSettings(mode, 1)).frames(latent)
    next(frames)
    handle = out_of_memory(svd.first_stage_model.decoder.norm_out, lambda x: x.shape[-1] > 64 * 8)
    try:
        with pytest.raises(MemoryError, match="in the middle of the video.*The latents are kept"):
            next(frames)
    finally:
        handle.remove()


def test_all_clips_of_a_video_are_tiled_or_none(svd: comfy.sd.VAE) -> None:
    latent, settings = wide_clip(4), DecodeSettings(EXACT, 1, clip_length=2)
    decoder, attention = ClipDecoder(svd, settings), svd.first_stage_model.decoder.mid.attn_1
    said: list[str] = []
    decoder.page = SimpleNamespace(say=said.append)
    handle = out_of_memory(attention, lambda x: x.shape[-1] > 64)
    try:
        tiled = torch.cat(list(decoder.frames(latent)))
        assert [line for line in said if "tiles of 64 latent pixels, which changes brightness" in line] == said[1:]
        frames = decoder.frames(latent)
        begun = [next(frames), next(frames)]
    finally:
        handle.remove()
    assert torch.equal(torch.cat([*begun, *frames]), tiled), "although memory is free again"
    frames = decoder.frames(latent)
    assert not torch.equal(torch.cat([next(frames), next(frames)]), tiled[:2])
    handle = out_of_memory(attention, lambda x: x.shape[-1] > 64)
    try:
        with pytest.raises(MemoryError, match="in the middle of the video"):
            next(frames)
    finally:
        handle.remove()


def test_tiles_of_images_need_no_memory_for_the_clip() -> None:
    """Frames of a VAE for images do not see each other, so each one is whole before the next one begins."""
    vae, latent, calls = image_vae(), wide_clip(3), []
    refuse = lambda x: x.shape[-1] > 64 or calls.append(1)  # noqa: E731
    handle = out_of_memory(vae.first_stage_model.decoder.mid.attn_1, refuse)
    try:
        frames = ClipDecoder(vae, DecodeSettings(chunk=1)).frames(latent)
        first = next(frames)
        assert len(first) == 1 and len(calls) == 2, "two tiles of one frame"
        found = torch.cat([first, *frames])
        assert len(calls) == 2 * len(latent)
        alone = [pixels for frame in latent.split(1) for pixels in ClipDecoder(vae).frames(frame)]
    finally:
        handle.remove()
    assert torch.equal(found, torch.cat(alone))
    assert 0 < (found - vae.decode(latent)).abs().mean() < 0.06


def test_nothing_helps(svd: comfy.sd.VAE) -> None:
    handle = out_of_memory(svd.first_stage_model.decoder.conv_in, lambda x: True)
    try:
        with pytest.raises(MemoryError, match="not enough memory to decode one frame"):
            decoded(svd, clip(3))
    finally:
        handle.remove()


@pytest.mark.parametrize(("latent", "length", "sentence"), [
    (torch.zeros(4, 16, 2, 2), 0, "16 channels and this VAE decodes 4"),
    (torch.zeros(1, 4, 4, 2, 2), 0, "5 axes"),
    (torch.zeros(7, 4, 2, 2), 3, "7 frames are no whole number of clips of 3"),
])  # fmt: skip
def test_latents_that_do_not_fit(svd: comfy.sd.VAE, latent: Tensor, length: int, sentence: str) -> None:
    decoder = ClipDecoder(svd, DecodeSettings(clip_length=length))
    for call in (decoder.size, lambda z: next(decoder.frames(z))):
        with pytest.raises(ClipError, match=sentence):
            call(latent)


def test_vae_with_a_time_axis_is_refused() -> None:
    vae = image_vae()
    vae.latent_dim = 3
    with pytest.raises(ModelMismatchError, match="its own time axis"):
        ClipDecoder(vae)


def test_node(vae: comfy.sd.VAE, run_node: Callable[..., tuple]) -> None:
    latent = clip(6)
    samples = {"samples": latent.clone(), "batch_index": [1]}
    settings = {"mode": EXACT, "chunk_frames": 4, "clip_length": 0}
    inputs = {"samples": samples, "vae": vae, "frame_rate": 12.5, **settings}
    (video,) = run_node("LatentMotionTemporalVAEDecode", **inputs)
    assert (video.get_frame_count(), video.get_frame_rate()) == (6, Fraction(25, 2))
    for _ in range(2):  # nothing is kept, so it can be used again
        images = video.get_components().images
        assert_same(images, whole(vae, latent))
    assert video.get_dimensions() == (images.shape[2], images.shape[1])
    assert torch.equal(samples["samples"], latent)
    with pytest.raises(ValueError, match="not one of its choices"):
        run_node("LatentMotionTemporalVAEDecode", **inputs | {"mode": "fast"})


def test_the_node_says_what_decoding_takes_although_another_one_saves(
    svd: comfy.sd.VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(host_vae, "watching_page", lambda: SimpleNamespace(say=said.append))
    film = host_vae.decode_video(svd, {"samples": clip(5)}, Fraction(8), DecodeSettings(EXACT, 4))
    monkeypatch.setattr(host_vae, "watching_page", lambda: pytest.fail("that would be the node that saves"))
    assert not said and len(film.get_components().images) == 5
    assert re.fullmatch(r"decoding 4 frames at once, about \d+ MiB of \d+ MiB free", *said)


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
@pytest.mark.parametrize("kind", ["svd", "images"])
def test_the_progress_of_a_save_never_goes_back(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bar is told; newer hosts pass on only some of it."""
    shares: list[float] = []

    class Bar(comfy.utils.ProgressBar):
        def update_absolute(self, value: float, total: float | None = None, preview: Any = None) -> None:
            super().update_absolute(value, total, preview)
            shares.append(self.current / self.total)

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    film = host_vae.decode_video({"images": image_vae, **VAES}[kind](), {"samples": clip(LONG)}, Fraction(8),
                                 DecodeSettings(mode, 2))  # fmt: skip
    film.get_components()
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 3
