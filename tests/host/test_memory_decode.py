"""Memory that runs out at every kind of layer of a VAE's decoder, in every mode: the same pixels, one warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from helpers_vae import clip, image_vae, svd_vae, vidrd_vae
from latentmotion.host import memory
from latentmotion.host import vae as host_vae
from latentmotion.host.vae import ClipDecoder, DecodeSettings
from latentmotion.motion_modules.temporal_vae import decode, flow
from latentmotion.motion_modules.temporal_vae.decode import EXACT, STREAMING
from torch import Tensor, nn

FRAMES, SURVEYED, CHUNK = 8, 4, 4
VAES = {"images": image_vae, "svd": svd_vae, "vidrd": vidrd_vae}
LAYERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "first": lambda decoder: decoder.conv_in,
    "residual layer": lambda decoder: decoder.mid.block_1.conv1,
    "attention": lambda decoder: decoder.mid.attn_1,
    "larger pictures": lambda decoder: decoder.up[1].upsample.conv,
    "last": lambda decoder: decoder.conv_out,
}
OVER_TIME: dict[str, tuple[Any, str]] = {
    "convolution": (flow, "_three_taps"),
    "weights fetched": (host_vae, "host_affine"),
    "frames put away": (memory, "park"),
}


@pytest.fixture(scope="module", autouse=True)
def short_survey() -> Iterator[None]:
    """Streaming begins with clips of four frames, so that the tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "SURVEY_FRAMES", SURVEYED)
        yield


@pytest.fixture(scope="module", params=VAES)
def vae(request: pytest.FixtureRequest) -> comfy.sd.VAE:
    return VAES[request.param]()


@pytest.mark.parametrize("kind", ["svd", "vidrd"])
def test_frames_that_would_not_fit_into_ram_are_refused_before_anything_is_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system ends the whole server then, and what was sampled is lost."""
    vae = VAES[kind]()
    needed = ClipDecoder(vae, DecodeSettings(EXACT, 1)).bytes_needed(clip(FRAMES), 1)
    monkeypatch.setattr(memory, "RESERVE", 0)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 0.9 * needed)
    said = f"To decode {FRAMES} frames exactly .* Set mode to 'streaming'"
    with watched(vae.first_stage_model.decoder.conv_in, lambda: pytest.fail("something was decoded")):
        with pytest.raises(MemoryError, match=said):
            decoded(vae, EXACT)
    assert len(decoded(vae, STREAMING)) == FRAMES
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 2.0 * needed)
    assert len(decoded(vae, EXACT)) == FRAMES


def decoded(vae: comfy.sd.VAE, mode: str) -> Tensor:
    return torch.cat(list(ClipDecoder(vae, DecodeSettings(mode, CHUNK)).frames(clip(FRAMES))))


@contextmanager
def watched(layer: nn.Module, hook: Callable[[], None]) -> Iterator[None]:
    """While the context lasts, `hook` runs before a layer does."""
    handle = layer.register_forward_pre_hook(lambda *_: hook())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def wrapped(owner: Any, name: str, hook: Callable[[], None]) -> Iterator[None]:
    """While the context lasts, `hook` runs before a function does."""
    real = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: hook() or real(*args, **kwargs))
        yield


def assert_nothing_changes(vae: comfy.sd.VAE, mode: str, place: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """At the first call of a place, in the middle and at the last one, when most frames were given out already."""
    calls: list[int] = []

    def run(fail_at: int | None = None) -> Tensor:
        def hook() -> None:
            calls.append(1)
            if len(calls) - 1 == fail_at:
                raise comfy.model_management.OOM_EXCEPTION("injected")

        calls.clear()
        with place(hook):
            return decoded(vae, mode)

    expected, count = run(), len(calls)
    assert expected.std() > 0.05 and count > 1
    for after in sorted({0, count // 2, count - 1}):
        caplog.clear()
        torch.testing.assert_close(run(after), expected, rtol=1e-5, atol=1e-5)
        assert len([1 for record in caplog.records if "Out of memory while decoding" in record.message]) == 1


@pytest.mark.parametrize("mode", [EXACT, STREAMING])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_runs_out_of_memory_changes_no_pixel(
    vae: comfy.sd.VAE, mode: str, layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = partial(watched, LAYERS[layer](vae.first_stage_model.decoder))
    assert_nothing_changes(vae, mode, place, caplog)


@pytest.mark.parametrize("kind", ["svd", "vidrd"])
@pytest.mark.parametrize("mode", [EXACT, STREAMING])
@pytest.mark.parametrize("work", OVER_TIME)
def test_work_over_time_that_runs_out_of_memory_changes_no_pixel(
    kind: str, mode: str, work: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_nothing_changes(VAES[kind](), mode, partial(wrapped, *OVER_TIME[work]), caplog)
