"""Files are right in every format, whole or not there, and carry the workflow where the canvas looks for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import films
import pytest
import torch
from latentmotion.media import formats, write
from latentmotion.media.clip import Clip, clip_of_images, collect_pictures, collect_sound, sound_of_samples
from latentmotion.media.errors import VideoError
from latentmotion.media.formats import Format
from latentmotion.media.geometry import Frame
from latentmotion.media.metadata import as_json
from latentmotion.media.read import read_clip
from latentmotion.media.timing import Selection
from latentmotion.media.write import Writing
from PIL import Image, ImageSequence

DEFAULT = formats.DEFAULT_QUALITY
FILMS = [Format.MP4, Format.WEBM_VP9, Format.WEBM_AV1]
GRAPH = {"nodes": [{"id": 1, "text": 'a "{red|blue} circle} {'}], "é": "ü"}
METADATA = {"workflow": GRAPH, "prompt": {"1": {"class_type": "X", "inputs": {"text": "{"}}}}


def saved(clip: Clip, folder: Path, form: Format, quality: int = DEFAULT, metadata: dict | None = None) -> Path:
    path = folder / f"film_00001_{form.extension}"
    write.write(clip, path, form, Writing(quality, metadata or {}))
    return path


def pictures_of(path: Path) -> torch.Tensor:
    """Every picture of a file, or of a folder of files, (f, h, w, 3)."""
    if path.suffix in (".mp4", ".webm"):
        return films.decode(path)[0]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    images = [frame.convert("RGB") for file in files for frame in ImageSequence.Iterator(Image.open(file))]
    return torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).reshape(i.height, i.width, 3)
                        for i in images]) / 255  # fmt: skip


@pytest.mark.parametrize("form", Format)
def test_colour_bars_come_back(form: Format, tmp_path: Path) -> None:
    """A WebP joins frames that are alike, so that its own are marked."""
    path = saved(films.clip(marked=form is Format.WEBP), tmp_path, form)
    found = pictures_of(path)
    assert found.shape == (6, 48, 192, 3)
    assert films.bars_error(found) <= (0 if form is Format.PNG else 2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_webp_of_the_highest_quality_is_lossless(tmp_path: Path) -> None:
    clip = films.clip(marked=True)
    assert torch.equal(pictures_of(saved(clip, tmp_path, Format.WEBP, quality=100)), collect_pictures(clip))
    scale = [formats.webp_quality(quality) for quality in range(101)]
    assert scale == sorted(scale) and (scale[0], scale[DEFAULT], scale[100]) == (0, 96, 100)


@pytest.mark.parametrize("form", FILMS)
def test_our_own_reader_gives_the_bars_back(form: Format, tmp_path: Path) -> None:
    clip = read_clip(saved(films.clip(), tmp_path, form), "film", Selection(), Frame())
    assert (clip.frames, clip.frame_rate) == (6, Fraction(24000, 1001))
    assert films.bars_error(collect_pictures(clip)) <= 2


@pytest.mark.parametrize("form", FILMS)
def test_films_say_which_colours_they_have(form: Format, tmp_path: Path) -> None:
    _, stream = films.decode(saved(films.clip(frames=2), tmp_path, form))
    context = stream.codec_context
    assert context.pix_fmt == "yuv420p" and stream.average_rate == Fraction(24000, 1001)
    assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("form", Format)
def test_odd_sizes(form: Format, tmp_path: Path) -> None:
    """h264 gets one row and one column more, copies of the last; every other format the size itself."""
    found = pictures_of(saved(films.clip(frames=2, height=49, spare=1), tmp_path, form, quality=90))
    assert found.shape[1:3] == ((50, 194) if form is Format.MP4 else (49, 193))
    assert films.bars_error(found) <= 3


def test_higher_quality_is_nearer_and_larger(tmp_path: Path) -> None:
    noise = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    clip = clip_of_images(torch.nn.functional.avg_pool2d(noise.movedim(3, 1), 5, 1, 2).movedim(1, 3), Fraction(8))
    for form in (*FILMS, Format.WEBP):
        sizes, errors = [], []
        for quality in (10, 95):
            path = saved(clip, tmp_path, form, quality)
            sizes.append(path.stat().st_size)
            errors.append(float((pictures_of(path) - collect_pictures(clip)).abs().mean()))
        assert sizes[0] < sizes[1] and errors[0] > 2 * errors[1], form


def test_ten_bits_where_the_encoder_has_them() -> None:
    shades = (torch.arange(96) / 95 * 0.02 + 0.5)[None, None, :, None].expand(2, 16, 96, 3)
    for bits, at_least in ((False, 1), (True, 12)):
        memory = BytesIO()
        how = Writing(100, ten_bit=bits)
        write.write_film(clip_of_images(shades, Fraction(8)), memory, formats.MP4, formats.H264, how)
        with av.open(BytesIO(memory.getvalue())) as container:
            frame = next(container.decode(video=0))
            assert len(set(frame.to_ndarray()[8].tolist())) >= at_least
            assert frame.format.name == ("yuv420p10le" if bits else "yuv420p")


@pytest.mark.parametrize(("form", "channels"), [(f, c) for f in FILMS for c in (1, 2, 4, 6, 8)])
def test_sound_is_carried_along(form: Format, channels: int, tmp_path: Path) -> None:
    """A 441 Hz tone comes back as one in each channel, as long as the pictures; four channels are mixed to two."""
    path = saved(films.clip(frames=24, rate=Fraction(24), tone=441, channels=channels), tmp_path, form)
    clip = read_clip(path, "film", Selection(), Frame())
    assert clip.sound.channels == {4: 2}.get(channels, channels)
    samples = torch.cat(list(clip.sound.chunks()), dim=1)
    assert abs(samples.shape[1] / clip.sound.rate - 1) < 0.05
    spectrum = torch.fft.rfft(samples[0, clip.sound.rate // 10 :][: clip.sound.rate // 2]).abs()
    assert abs(int(spectrum.argmax()) * 2 - 441) <= 3 and samples.abs().max() > 0.2


def test_channels_stay_apart(tmp_path: Path) -> None:
    """Each of eight channels is silent but for a while of its own. (An encoder leaves little of the bass channel.)"""
    samples = torch.zeros(8, 48000)
    for channel in range(8):
        samples[channel, 6000 * channel : 6000 * (channel + 1)] = torch.sin(torch.arange(6000) * 0.05)
    clip = clip_of_images(films.colour_bars().repeat(8, 1, 1, 1), Fraction(8), sound_of_samples(samples, 48000))
    found = collect_sound(read_clip(saved(clip, tmp_path, Format.MP4), "film", Selection(), Frame()).sound)
    loud = found[:, :48000].view(8, 8, 6000).square().mean(2)
    high = [channel for channel in range(8) if channel != 3]
    assert loud.argmax(0)[high].tolist() == high and loud[high, high].min() > 0.1


def test_more_channels_than_can_be_written_are_refused(tmp_path: Path) -> None:
    clip = clip_of_images(films.colour_bars(), Fraction(8), sound_of_samples(torch.zeros(9, 6000), 48000))
    with pytest.raises(VideoError, match="has 9 channels, and at most 8 can be written"):
        saved(clip, tmp_path, Format.MP4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "rate", "sentence"), [
    ((8, 300), 8, "AV1 cannot be written at 300 x 8: both sides need at least 32 pixels"),
    ((64, 64), 250, "AV1 cannot be written at 250 frames a second, only up to 240"),
])  # fmt: skip
def test_what_an_encoder_never_comes_back_from_is_refused(
    size: tuple[int, int], rate: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_mux", lambda *given: pytest.fail("the encoder was opened"))
    with pytest.raises(VideoError, match=sentence):
        saved(clip_of_images(torch.zeros(2, *size, 3), Fraction(rate)), tmp_path, Format.WEBM_AV1)


def test_sound_longer_than_the_pictures_is_cut(tmp_path: Path) -> None:
    clip = clip_of_images(
        films.colour_bars().repeat(4, 1, 1, 1), Fraction(8), sound_of_samples(torch.rand(1, 48000), 16000)
    )
    with av.open(str(saved(clip, tmp_path, Format.MP4))) as container:
        assert container.duration / av.time_base < 0.7


def front_end_json(path: Path) -> dict[str, object]:
    """Workflow and prompt by the rules of the canvas (front end 1.32.9), which are not those of the standards."""
    data = path.read_bytes()
    if path.suffix == ".webm":  # counts braces from the first one, within 2 MiB
        found = {}
        for name in ("WORKFLOW", "PROMPT"):
            at = data[: 2 << 20].index(name.encode())
            at = data.index(b"{", at)
            stop, depth = at, 1
            while depth:
                stop += 1
                depth += (data[stop] == 123) - (data[stop] == 125)
            found[name.lower()] = json.loads(data[at : stop + 1])
        return found
    if path.suffix == ".mp4":  # whole boxes before the media data
        assert data.index(b"moov") < data.index(b"mdat")
        with av.open(str(path)) as container:
            return {name: json.loads(container.metadata[name]) for name in METADATA}
    if path.suffix == ".png":
        return {name: json.loads(Image.open(path).text[name]) for name in METADATA}
    at = 12  # WebP: chunk by chunk, sizes unpadded
    while data[at : at + 4] != b"EXIF":
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    entries = re.findall(rb"(prompt|workflow):(\{.*?)\x00", data[at:])
    return {name.decode(): json.loads(text) for name, text in entries}


@pytest.mark.parametrize("form", Format)
def test_workflow_is_found_where_the_canvas_looks(form: Format, tmp_path: Path) -> None:
    path = saved(films.clip(frames=3, tone=440), tmp_path, form, metadata=METADATA)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        assert front_end_json(file) == METADATA


def test_json_with_braces_in_texts_counts_out() -> None:
    text = as_json(GRAPH)
    assert text.isascii() and json.loads(text) == GRAPH
    assert text.count("{") == text.count("}") == 2
    assert as_json(text) == text, "JSON that is text already stays as it is"


class Stop(Exception):
    pass


@pytest.mark.parametrize("form", Format)
def test_cancel_in_the_middle_leaves_nothing(form: Format, tmp_path: Path) -> None:
    """After so many frames that the encoders, which look ahead, have begun to write."""
    asked = []

    def cancel(done: int) -> None:
        asked.append(done)
        if done == 80:
            assert form is Format.WEBP or list(tmp_path.iterdir()), "the file is being written beside its place"
            raise Stop

    with pytest.raises(Stop):
        write.write(films.clip(90), tmp_path / f"film{form.extension}", form, Writing(70, on_frame=cancel))
    assert asked == [*range(1, 81)] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", Format)
def test_every_picture_is_reported(form: Format, tmp_path: Path) -> None:
    seen: list[int] = []
    write.write(films.clip(frames=4), tmp_path / f"film{form.extension}", form, Writing(70, on_frame=seen.append))
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("form", [Format.MP4, Format.PNG])
def test_a_source_that_fails_leaves_nothing_and_the_older_file_stays(form: Format, tmp_path: Path) -> None:
    path = tmp_path / f"film{form.extension}"
    if form is Format.MP4:
        path.write_bytes(b"older")

    def chunks():
        yield torch.zeros(2, 48, 192, 3)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write.write(Clip(6, 48, 192, Fraction(8), chunks), path, form, Writing(70))
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if form is Format.MP4 else [])
    assert form is Format.PNG or path.read_bytes() == b"older"


@pytest.mark.parametrize("frames", [5, 7])
def test_a_source_of_another_length_is_an_error(frames: int, tmp_path: Path) -> None:
    clip = Clip(6, 48, 192, Fraction(8), films.clip(frames=frames).chunks)
    with pytest.raises(VideoError, match="6"):
        saved(clip, tmp_path, Format.MP4)
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys, signal
from pathlib import Path
sys.path[:0] = {paths!r}
import pack; pack.load_pack()
import torch
from fractions import Fraction
from latentmotion.media import write
from latentmotion.media.clip import clip_of_images
from latentmotion.media.formats import Format
folder = Path(sys.argv[1])
noise = torch.rand(40, 64, 64, 3, generator=torch.Generator().manual_seed(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for form in (Format.MP4, Format.WEBM_VP9, Format.WEBP):
    try:
        write.write(clip_of_images(noise, Fraction(8)), folder / ("film" + form.extension), form, write.Writing(95))
        print(form.name, "was written")
    except ValueError as error:
        print(form.name, str(error), [p.name for p in folder.iterdir()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX")
def test_a_file_that_outgrows_its_limit_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses to write after 20 kB, as a full disk does, and ffmpeg is the one that is told."""
    code = FULL_DISK.format(paths=[p for p in sys.path if p.endswith("scripts")])
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line[:4] in ("MP4 ", "WEBM", "WEBP")]
    assert run.returncode == 0 and len(lines) == 3, run.stdout + run.stderr
    assert all("grew larger" in line and line.endswith("[]") for line in lines), lines


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize(("number", "said"), [(28, "no room left"), (13, "not allowed"), (5, "could not be written")])
def test_errors_of_the_system_are_sentences(
    form: Format, number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise OSError(number, "the system says so")

    monkeypatch.setattr(av if form in FILMS else Image.Image, "open" if form in FILMS else "save", fail)
    with pytest.raises(VideoError, match=said):
        saved(films.clip(), tmp_path, form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", Format)
def test_a_folder_that_is_not_there_is_a_sentence(form: Format, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="does not exist"):
        saved(films.clip(), tmp_path / "nowhere", form)


@pytest.mark.parametrize("form", FILMS)
def test_a_missing_encoder_is_a_sentence(form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av.codec, "codecs_available", {"png"})
    with pytest.raises(VideoError, match="was built without lib"):
        saved(films.clip(), tmp_path, form)


def test_no_frames_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no frames"):
        saved(clip_of_images(torch.zeros(0, 8, 8, 3), Fraction(8)), tmp_path, Format.MP4)


def test_a_single_frame(tmp_path: Path) -> None:
    for form in Format:
        assert len(pictures_of(saved(films.clip(frames=1), tmp_path, form))) == 1
