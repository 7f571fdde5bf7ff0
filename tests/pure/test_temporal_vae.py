"""The engine on a small decoder of plain torch layers: chunks, ends of the clip, statistics, memory, clips apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from latentmotion.bench.side_by_side import peak_bytes
from latentmotion.motion_modules.temporal_vae import decode
from latentmotion.motion_modules.temporal_vae.decode import Workshop, exact, streaming, survey, work_units
from latentmotion.motion_modules.temporal_vae.network import TemporalConvs
from latentmotion.motion_modules.temporal_vae.plan import Plan, Spatial, Stage, Temporal, measure, norms_of, pool
from torch import Tensor, nn

LONG = decode.SURVEY_FRAMES + 7


class Decoder(nn.Module):
    """Two temporal blocks of both kinds, and a convolution over time at the end, as one call on a whole clip."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.blocks = nn.ModuleList([TemporalConvs(32, stages=2), TemporalConvs(32)])
        self.time = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else noise * 0.3 + 1.0
        self.eval().requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for weight, block in zip((0.3, 1.0), self.blocks, strict=True):
            x = torch.lerp(x, block(x), weight)
        return self.time(self.conv_out(x).transpose(0, 1)[None])[0].transpose(0, 1)

    def plan(self) -> Plan:
        blocks = [Temporal(tuple(Stage(*pair) for pair in block.stages()), lambda x, weight=weight: weight)
                  for weight, block in zip((0.3, 1.0), self.blocks, strict=True)]  # fmt: skip
        return (conv(self.conv_in), *blocks, conv(self.conv_out), Temporal((Stage(None, self.time),)))


def conv(layer: nn.Conv2d) -> Spatial:
    return Spatial(layer, layer.out_channels, lambda pixels: (layer.in_channels + layer.out_channels) * pixels)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


def latent(frames: int, seed: int = 1) -> Tensor:
    """Frames that change slowly, with a cut in the middle."""
    noise = torch.randn(frames, 4, 6, 5, generator=torch.Generator().manual_seed(seed))
    x = noise.cumsum(0) / torch.arange(1, frames + 1)[:, None, None, None].sqrt()
    x[frames // 2 :] = 0.5 * x[frames // 2 :] + 1.0
    return x


def joined(pieces: object) -> Tensor:
    return torch.cat(list(pieces))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, LONG])
def test_exact_is_one_call_on_the_whole_clip(decoder: Decoder, chunk: int) -> None:
    z = latent(LONG)
    found = joined(exact(decoder.plan(), z, Workshop(chunk)))
    torch.testing.assert_close(found, decoder(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 3])
@pytest.mark.parametrize("chunk", [1, 2])
def test_shortest_clips(decoder: Decoder, frames: int, chunk: int) -> None:
    z = latent(frames)
    for decoding in (exact, streaming):
        found = joined(decoding(decoder.plan(), z, Workshop(chunk)))
        torch.testing.assert_close(found, decoder(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 3, 7, LONG])
def test_streaming_gives_the_same_pixels_for_every_chunk(decoder: Decoder, chunk: int) -> None:
    plan, z = decoder.plan(), latent(LONG)
    one = joined(streaming(plan, z, Workshop(1)))
    torch.testing.assert_close(joined(streaming(plan, z, Workshop(chunk))), one, rtol=1e-5, atol=1e-5)


def test_streaming_differs_from_exact_by_its_statistics_only(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, z = decoder.plan(), latent(LONG)
    expected = decoder(z)
    distance = (joined(streaming(plan, z, Workshop(3))) - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < distance < 0.1
    monkeypatch.setattr(decode, "surveyed", lambda latent: latent)
    torch.testing.assert_close(joined(streaming(plan, z, Workshop(3))), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_forgotten_between_two_clips(decoder: Decoder) -> None:
    plan = decoder.plan()
    for decoding in (exact, streaming):
        first = joined(decoding(plan, latent(LONG), Workshop(3)))
        joined(decoding(plan, 10 * latent(LONG, 2), Workshop(3)))
        assert torch.equal(joined(decoding(plan, latent(LONG), Workshop(3))), first)


def test_latents_are_not_written_to(decoder: Decoder) -> None:
    z = latent(LONG)
    kept = z.clone()
    for decoding in (exact, streaming):
        joined(decoding(decoder.plan(), z, Workshop(4)))
        assert torch.equal(z, kept)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("frames", [5, LONG])
def test_progress_ends_at_the_announced_number(decoder: Decoder, streams: bool, frames: int) -> None:
    plan, told = decoder.plan(), []
    joined((streaming if streams else exact)(plan, latent(frames), Workshop(3, on_frames=told.append)))
    assert sum(told) == work_units(plan, frames, streams)


def test_where_frames_are_parked_does_not_matter(decoder: Decoder) -> None:
    """Once per norm, and not as the tensors that go on."""
    parked: list[int] = []

    def park(frames: Tensor) -> Tensor:
        parked.append(len(frames))
        return frames.clone()

    plan, z = decoder.plan(), latent(LONG)
    assert torch.equal(joined(exact(plan, z, Workshop(4, park))), joined(exact(plan, z, Workshop(4))))
    assert sum(parked) == LONG * len(list(norms_of(plan)))


def peak(decoder: Decoder, decoding: Callable[..., Iterator[Tensor]], frames: int) -> int:
    z = latent(frames)

    def run() -> None:
        for piece in decoding(decoder.plan(), z, Workshop(2)):
            del piece

    return peak_bytes(run)


def test_memory_of_streaming_does_not_grow_with_the_clip(decoder: Decoder) -> None:
    assert peak(decoder, streaming, LONG + 60) < 1.02 * peak(decoder, streaming, LONG + 30)


def test_memory_of_exact_grows_by_two_feature_maps_a_frame(decoder: Decoder) -> None:
    feature_map = 32 * 6 * 5 * 4
    growth = peak(decoder, exact, LONG + 30) - peak(decoder, exact, LONG)
    assert 1.9 * 30 * feature_map < growth < 2.3 * 30 * feature_map


def test_pooled_statistics_keep_their_digits() -> None:
    """Large means and small variances, in 16 bit and in any grouping of the frames."""
    x = 100 + torch.randn(9, 8, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    wide = x.double().transpose(0, 1).reshape(4, -1)
    for parts in ((9,), (1, 8), (4, 4, 1)):
        found = pool([measure(part, 4) for part in x.split(parts)])
        torch.testing.assert_close(found.mean.double(), wide.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.variance.double(), wide.var(1, correction=0), rtol=1e-4, atol=0)
    half = pool([measure(x.bfloat16(), 4)])
    rounded = x.bfloat16().double().transpose(0, 1).reshape(4, -1)
    torch.testing.assert_close(half.variance.double(), rounded.var(1, correction=0), rtol=1e-3, atol=0)


def test_survey_of_the_whole_clip_is_what_exact_finds(decoder: Decoder) -> None:
    plan, z = decoder.plan(), latent(decode.SURVEY_FRAMES)
    found = survey(plan, z, Workshop(5))
    assert list(found) == list(norms_of(plan))
    x = decoder.conv_in(z).transpose(0, 1).reshape(32, -1)
    torch.testing.assert_close(found[next(norms_of(plan))].mean, x.mean(1), rtol=1e-4, atol=1e-5)
