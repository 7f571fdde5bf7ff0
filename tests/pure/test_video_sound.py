"""Sound comes in with its pictures: in time, over damage and changes on the way, and from far into a file."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import films
import numpy as np
import pytest
import torch
from films import loaded
from latentmotion.media import read, sound, write
from latentmotion.media.clip import Clip, collect_pictures, collect_sound, part_of_clip
from latentmotion.media.formats import Format
from latentmotion.media.write import Writing


def film_with_sound(path: Path, spoil: Callable[[int, av.Packet], av.Packet], then_mono: bool = False) -> Path:
    """Two seconds of pictures and a tone in stereo whose packets go through `spoil`; its second half may be mono."""
    with av.open(str(path), "w") as output:
        pictures, tone = output.add_stream("libx264", rate=10), output.add_stream("mp2", rate=48000, layout="stereo")
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        for number in range(20):
            grey = np.full((64, 64, 3), 20 + 6 * number, np.uint8)
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        output.mux(pictures.encode(None))
        mono = av.CodecContext.create("mp2", "w")
        mono.sample_rate, mono.layout, mono.format, mono.bit_rate = 48000, "mono", "s16", 64000
        wave, number = (np.sin(np.arange(96000) * 0.05) * 9000).astype("int16"), 0
        for start in range(0, 96000, 1152):
            single = then_mono and start >= 48000
            part = wave[start : start + 1152]
            samples = part[None] if single else part.repeat(2)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono" if single else "stereo")
            frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), start
            for packet in (mono if single else tone).encode(frame):
                packet.stream = tone
                output.mux(spoil(number, packet))
                number += 1
    return path


def noise_in_the_middle(number: int, packet: av.Packet) -> av.Packet:
    if not 30 <= number < 40:
        return packet
    made = av.Packet(np.random.default_rng(number).bytes(packet.size))
    made.pts, made.dts, made.time_base, made.stream = packet.pts, packet.dts, packet.time_base, packet.stream
    return made


def test_damaged_sound_is_silent_and_stays_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = loaded(film_with_sound(tmp_path / "damaged.mkv", noise_in_the_middle))
    assert films.numbers_of(collect_pictures(clip)) == [*range(20)]
    samples = collect_sound(clip.sound)
    assert samples.shape[0] == 2 and abs(samples.shape[1] - 96000) < 4000
    loud = samples[0, : 80 * 1152].view(80, 1152).abs().amax(1) > 0.1
    assert loud[3:28].all() and not loud[32:38].any() and loud[44:78].all()
    assert [entry.message for entry in caplog.records if "sound is damaged at 0.7" in entry.message] == caplog.messages


def test_sound_that_becomes_mono_goes_on(tmp_path: Path) -> None:
    samples = collect_sound(loaded(film_with_sound(tmp_path / "broadcast.mkv", lambda _, packet: packet, True)).sound)
    assert samples.shape[0] == 2 and samples.shape[1] > 90000
    assert samples[:, 60000:80000].abs().amax(1).min() > 0.1 and samples[:, 10000:40000].abs().amax(1).min() > 0.1


def test_sound_starts_where_the_pictures_do(tmp_path: Path) -> None:
    """A click in the middle of the file stays with its frame when frames are skipped or the clip is cut."""
    pictures = films.clip(frames=40, rate=Fraction(20))
    samples = torch.zeros(1, 88200)
    samples[:, 44100:44500] = 0.9
    whole = Clip(40, 48, 192, Fraction(20), pictures.chunks, films.sound_of_samples(samples, 44100))
    write.write(whole, tmp_path / "click.mp4", Format.MP4, Writing(80))
    for clip in (loaded(tmp_path / "click.mp4", skip=15, cap=10), part_of_clip(loaded(tmp_path / "click.mp4"), 15, 10)):
        found = collect_sound(clip.sound)
        assert abs(found.shape[1] - 22050) <= 1
        assert abs(int((found.abs() > 0.4).nonzero()[0, 1]) - 11025) < 300


@pytest.mark.parametrize(("ending", "pictures", "tone"), [
    ("mp4", "libx264", "aac"), ("mkv", "libx264", "flac"), ("mkv", "libx264", "mp3"), ("webm", "libvpx-vp9", "libopus"),
    ("mov", "libx264", "pcm_s16le"), ("ts", "libx264", "mp2"),
])  # fmt: skip
def test_sound_far_into_a_file_is_sought(
    ending: str, pictures: str, tone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time stamps of whole milliseconds may move it by 48 samples."""
    path = films.sounding_film(tmp_path / f"long.{ending}", pictures, tone, seconds=40)
    far = collect_sound(loaded(path, skip=150, cap=20).sound)
    taken: list[float] = []
    demux = sound._frames
    monkeypatch.setattr(sound, "_frames", lambda *file: (taken.append(f[0].time) or f for f in demux(*file)))
    assert torch.equal(collect_sound(loaded(path, skip=150, cap=20).sound), far)
    assert 22 < min(taken) and len(taken) * 1024 / 48000 < 12, "decoded from the beginning"
    monkeypatch.setattr(read, "FAR", 1000)
    whole = collect_sound(loaded(path, skip=150, cap=20).sound)
    assert min(taken) < 1 and far.shape == whole.shape == (1, 4 * 48000)
    inner, moved = far[:, 100:-100], (whole[:, 100 + i : whole.shape[1] - 100 + i] for i in range(-48, 49))
    assert min(float((inner - other).abs().max()) for other in moved) < 0.02, "not the same sound"


def test_sound_that_begins_late_is_found_without_seeking(tmp_path: Path) -> None:
    path = films.sounding_film(tmp_path / "late.mkv", "libx264", "flac", seconds=40, silent=30)
    found = collect_sound(loaded(path, skip=100, cap=60).sound)  # from 20 to 32 seconds
    assert found.shape == (1, 12 * 48000)
    assert not found[:, : 10 * 48000 - 100].any() and found[:, 10 * 48000 + 100 :].abs().max() > 0.1
