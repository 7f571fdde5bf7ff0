"""Files come in right: by their time stamps, upright, in the size asked for, in chunks; or with a sentence."""

from __future__ import annotations

import wave
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import films
import numpy as np
import pytest
import torch
from films import loaded
from latentmotion.media import read, write
from latentmotion.media.clip import collect_pictures
from latentmotion.media.errors import VideoError
from latentmotion.media.formats import Format
from latentmotion.media.geometry import Fit, Frame, fit
from latentmotion.media.read import read_clip
from latentmotion.media.timing import Selection
from latentmotion.media.write import Writing

EVEN = [100 * i for i in range(30)]  # ten frames a second, in milliseconds


@pytest.fixture(scope="module")
def ten_fps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return films.grey_film(tmp_path_factory.mktemp("films") / "ten.mp4", EVEN, options={"crf": "1", "g": "8"})


@pytest.mark.parametrize("wanted", [
    {}, {"skip": 13}, {"skip": 29}, {"every_nth": 4}, {"cap": 3}, {"skip": 9, "every_nth": 2, "cap": 5},
    {"frame_rate": Fraction(20)}, {"frame_rate": Fraction(3)}, {"frame_rate": Fraction(20), "skip": 21, "cap": 7},
])  # fmt: skip
def test_frames_are_those_of_the_plan(ten_fps: Path, wanted: dict) -> None:
    clip = loaded(ten_fps, **wanted)
    rate = wanted.get("frame_rate", Fraction(10))
    ticks = [*range(round(3 * rate))][wanted.get("skip", 0) :: wanted.get("every_nth", 1)][: wanted.get("cap") or None]
    assert clip.frame_rate == rate / wanted.get("every_nth", 1)
    assert films.numbers_of(collect_pictures(clip)) == [int(tick * 10 / rate) for tick in ticks]
    assert clip.frames == len(ticks)


def test_chunks_are_small_and_can_be_had_again(ten_fps: Path) -> None:
    clip = loaded(ten_fps)
    assert [len(chunk) for chunk in clip.chunks()] == [16, 14]
    first, again = next(clip.chunks()), next(clip.chunks())
    assert torch.equal(first, again) and first.dtype == torch.float32 and first.shape[1:] == (32, 64, 3)


def test_only_what_is_asked_for_is_decoded(ten_fps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key frame every eight: frame 17 needs 16 and 17, whatever comes before or after."""
    clip, decoded = loaded(ten_fps, skip=17, cap=1), []
    pictures = read._pictures
    monkeypatch.setattr(read, "_pictures", lambda *a: (decoded.append(f.pts) or f for f in pictures(*a)))
    assert films.numbers_of(collect_pictures(clip)) == [17]
    assert len(decoded) <= 4


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4")])
def test_containers(ending: str, codec: str, tmp_path: Path) -> None:
    path = films.grey_film(tmp_path / f"film.{ending}", [*range(12)], Fraction(1, 10), codec=codec, options={"q": "2"})
    clip = loaded(path, skip=5)
    assert films.numbers_of(collect_pictures(clip)) == [*range(5, 12)] and clip.frame_rate == 10


@pytest.mark.parametrize("ending", ["avi", "264"])
def test_without_usable_time_stamps_the_order_counts(ending: str, tmp_path: Path) -> None:
    """A bare stream has none, and those of pictures that look ahead are in the order of decoding in avi."""
    options = {"crf": "1", "bf": "3", "g": "12", "b_strategy": "0"}
    path = films.grey_film(tmp_path / f"film.{ending}", [*range(36)], Fraction(1, 25), options=options)
    assert films.numbers_of(collect_pictures(loaded(path))) == [*range(36)]
    assert films.numbers_of(collect_pictures(loaded(path, skip=20, cap=5))) == [*range(20, 25)]


def test_variable_frame_rate(tmp_path: Path) -> None:
    """Shown at the right times: 0 for 100 ms, 1 for 500 ms, 2 to 5 for 50 ms each."""
    path = films.grey_film(tmp_path / "phone.mp4", [0, 100, 600, 650, 700, 750])
    clip = loaded(path, frame_rate=Fraction(20))
    assert films.numbers_of(collect_pictures(clip)) == [0, 0, *[1] * 10, 2, 3, 4, 5]
    own = loaded(path)
    assert abs(float(own.seconds) - 0.8) < 0.1, "at the file's own mean rate it is as long as the file"


@pytest.mark.parametrize("turned", [0, 90, 180, -90])
def test_turned_recordings_are_upright(turned: int, tmp_path: Path) -> None:
    """The stored picture is white at the top left; a player turns it counter-clockwise by the flag."""
    clip = loaded(films.grey_film(tmp_path / "turned.mp4", [0, 100], turned=turned, top_left=True))
    assert (clip.height, clip.width) == ((64, 32) if turned % 180 else (32, 64))
    picture = collect_pictures(clip)[0]
    corners = {(0, 0): picture[2, 2], (1, 0): picture[-3, 2], (0, 1): picture[2, -3], (1, 1): picture[-3, -3]}
    white = max(corners, key=lambda corner: float(corners[corner].sum()))
    assert white == {0: (0, 0), 90: (1, 0), 180: (1, 1), -90: (0, 1)}[turned]


@pytest.mark.parametrize(("frame", "size"), [
    (Frame(), (32, 64)), (Frame(16, 0), (16, 32)), (Frame(0, 16), (8, 16)), (Frame(16, 16), (16, 16)),
    (Frame(16, 16, Fit.PAD), (16, 16)), (Frame(48, 20, Fit.STRETCH), (48, 20)),
])  # fmt: skip
def test_size_while_loading(frame: Frame, size: tuple[int, int], ten_fps: Path) -> None:
    clip = loaded(ten_fps, frame, cap=2)
    assert (clip.height, clip.width) == size
    assert collect_pictures(clip).shape == (2, *size, 3)


def test_fits() -> None:
    """A picture black on the left and white on the right, into a square."""
    picture = torch.cat([torch.zeros(1, 20, 30, 3), torch.ones(1, 20, 30, 3)], dim=2)
    rows = {how: fit(picture, Frame(20, 20, how))[0, :, :, 0] for how in Fit}
    for row in (rows[Fit.CROP], rows[Fit.STRETCH], rows[Fit.PAD][8:12]):
        assert row[:, :7].max() < 0.01 and row[:, -7:].min() > 0.99
    assert rows[Fit.PAD][:6].max() == 0 and rows[Fit.PAD][-6:].max() == 0
    assert fit(picture, Frame()) is picture


def test_small_files_without_a_tag_are_bt601_and_large_ones_bt709(tmp_path: Path) -> None:
    red = torch.tensor([0.8, 0.1, 0.1]).expand(1, 8, 8, 3)
    for height, matrix in ((64, 5), (720, 1)):
        path = tmp_path / f"{height}.mp4"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("libx264", rate=8, options={"crf": "1"})
            stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
            pixels = (red[0].repeat(height // 8, 8, 1) * 255).round().byte().numpy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
            frame.colorspace = 2
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        found = collect_pictures(loaded(path))[0].mean((0, 1))
        assert (found - red[0, 0, 0]).abs().max() < 0.02, height


def test_a_file_in_memory(ten_fps: Path) -> None:
    memory = BytesIO(ten_fps.read_bytes())
    clip = read_clip(memory, "memory", Selection(), Frame())
    assert films.numbers_of(collect_pictures(clip)) == films.numbers_of(collect_pictures(clip)) == [*range(30)]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(VideoError) as caught:
        collect_pictures(loaded(path))
    assert all(word in str(caught.value) for word in (path.name, *words)), caught.value


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    for name, data in (
        ("text.mp4", b"hello " * 100),
        ("empty.mp4", b""),
        ("noise.mkv", np.random.default_rng(0).bytes(4000)),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "cannot be read")
    refused(tmp_path / "absent.mp4", "not there")


def test_sound_alone(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    refused(tmp_path / "sound.wav", "only sound", "Load Audio")


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    """An mp4 with its index first, so that it opens; an mp4 whose index is gone; a webm, which is good up to there."""
    noise = torch.rand(20, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    clip = films.clip_of_images(noise, Fraction(8))
    for form in (Format.MP4, Format.WEBM_VP9):
        write.write(clip, tmp_path / f"whole{form.extension}", form, Writing(80))
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.mp4", "cut off")
    films.grey_film(tmp_path / "late.mp4", EVEN)
    data = (tmp_path / "late.mp4").read_bytes()
    (tmp_path / "lost.mp4").write_bytes(data[: data.index(b"moov") - 4])
    refused(tmp_path / "lost.mp4", "cannot be read")
    data = (tmp_path / "whole.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 2])
    assert 0 < len(collect_pictures(loaded(tmp_path / "cut.webm"))) < 20


def test_damage_in_the_middle_is_a_sentence(tmp_path: Path) -> None:
    noise = torch.rand(20, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    write.write(films.clip_of_images(noise, Fraction(8)), tmp_path / "good.webm", Format.WEBM_VP9, Writing(80))
    with av.open(str(tmp_path / "good.webm")) as container:
        place = [packet.pos for packet in container.demux(video=0) if packet.size][10]
    data = bytearray((tmp_path / "good.webm").read_bytes())
    data[place + 4 : place + 400] = np.random.default_rng(0).bytes(396)
    (tmp_path / "bad.webm").write_bytes(data)
    refused(tmp_path / "bad.webm", "damaged", "frame_cap")


def test_nothing_left_to_load(ten_fps: Path) -> None:
    with pytest.raises(VideoError, match=r"30 frames \(3.00 s\).*Lower skip_frames"):
        loaded(ten_fps, skip=30)
