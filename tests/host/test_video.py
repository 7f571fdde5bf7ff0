"""VIDEO objects that decode while they are saved, through the host's own nodes and executor."""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import tiny_host
import torch
from comfy_api.latest import Input, InputImpl, Types
from latentmotion.demo import config
from latentmotion.host import demo_models, video
from latentmotion.host.video import StreamedVideo
from latentmotion.media import write
from latentmotion.media.clip import Clip, clip_of_images, sound_of_samples
from latentmotion.media.errors import VideoError
from PIL import Image

FRAMES, HEIGHT, WIDTH, RATE = 40, 32, 48, Fraction(8)
LOAD = {"frame_rate": 0.0, "skip_frames": 0, "every_nth": 1, "frame_cap": 0, "width": 0, "height": 0, "fit": "crop"}
Graph = Callable[..., dict]


class Source:
    """A clip of random frames in chunks of four, which counts how many of its chunks are alive at once."""

    def __init__(self, at_frame: Callable[[int], None] = lambda frame: None, frames: int = FRAMES) -> None:
        self.started = self.most = 0
        self.frames = frames
        self._at_frame = at_frame
        self._alive: list[weakref.ref] = []
        sound = sound_of_samples(torch.zeros(2, round(frames / RATE * 8000)), 8000)
        self.clip = Clip(frames, HEIGHT, WIDTH, RATE, self._chunks, sound)
        self.pictures = torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))

    def _chunks(self) -> Iterator[torch.Tensor]:
        self.started += 1
        for start in range(0, self.frames, 4):
            self._at_frame(start)
            chunk = self.pictures[start : start + 4].clone()
            self._alive.append(weakref.ref(chunk))
            self.most = max(self.most, sum(ref() is not None for ref in self._alive))
            yield chunk
            del chunk


@pytest.fixture
def output(base_directory: Path) -> Path:
    """The host's output folder, empty."""
    folder = Path(folder_paths.get_output_directory())
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return folder


@pytest.fixture
def streams(core_nodes: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two nodes for graphs: one that "samples", counted, and one that makes a StreamedVideo of what was sampled."""
    kept: dict[str, Any] = {"sampled": 0, "source": Source()}

    class TinySample:
        FUNCTION, RETURN_TYPES, CATEGORY = "run", ("LATENT",), "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def run(self) -> tuple:
            kept["sampled"] += 1
            kept["latent"] = torch.ones(FRAMES, 4, 4, 6)
            return ({"samples": kept["latent"]},)

    class TinyStream:
        FUNCTION, RETURN_TYPES, CATEGORY = "run", ("VIDEO",), "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"samples": ("LATENT",)}})

        def run(self, samples: dict) -> tuple:
            return (StreamedVideo(kept["source"].clip),)

    for node in (TinySample, TinyStream):
        monkeypatch.setitem(core_nodes, node.__name__, node)
    return kept


def _node(class_type: str, **inputs: Any) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def _graph(class_type: str = "SaveVideo", **inputs: Any) -> dict[str, dict]:
    """Sample, stream, save; with the host's node by default."""
    widgets = {"filename_prefix": "film", "format": "auto", "codec": "auto"} if class_type == "SaveVideo" else {}
    return {
        "sample": _node("TinySample"),
        "stream": _node("TinyStream", samples=["sample", 0]),
        "save": _node(class_type, video=["stream", 0], **(widgets | inputs)),
    }


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_everything_is_known_without_decoding() -> None:
    def fail() -> Iterator[torch.Tensor]:
        raise AssertionError("a frame was asked for")
        yield

    found = StreamedVideo(Clip(2000, 512, 768, Fraction(30000, 1001), fail))
    assert isinstance(found, Input.Video)
    assert found.get_dimensions() == (768, 512) and found.get_frame_count() == 2000
    assert found.get_frame_rate() == Fraction(30000, 1001) and found.get_duration() == pytest.approx(66.733, abs=1e-3)
    assert found.get_container_format() == "mp4"


def test_every_method_of_this_host_is_there_with_its_arguments() -> None:
    for name, theirs in inspect.getmembers(Input.Video, inspect.isfunction):
        if name.startswith("_"):
            continue
        ours = inspect.signature(getattr(StreamedVideo, name)).parameters
        wanted = list(inspect.signature(theirs).parameters)
        assert wanted == list(ours)[: len(wanted)], name


def test_hosts_save_video_streams(streams: dict, output: Path, run_graph: Graph) -> None:
    """Chunk by chunk: never more than the one being encoded and the one being made."""
    result = run_graph(_graph())
    assert result["success"]
    source = streams["source"]
    assert source.started == 1 and source.most <= 2
    assert _files(output) == ["film_00001_.mp4"]
    with av.open(str(output / "film_00001_.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert json.loads(container.metadata["prompt"])["save"]["class_type"] == "SaveVideo"
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
        assert container.streams.video[0].average_rate == RATE


def test_images_where_they_are_asked_for(streams: dict, run_node: Callable) -> None:
    images, audio, rate = run_node("GetVideoComponents", video=StreamedVideo(streams["source"].clip))[:3]
    assert torch.equal(images, streams["source"].pictures) and rate == 8.0
    assert audio["waveform"].shape == (1, 2, 40000) and audio["sample_rate"] == 8000


def test_frames_of_a_vae_in_a_stream(output: Path) -> None:
    """Frame by frame from a latent with the host's VAE: what is in the file is what VAE Decode would have given."""
    network = tiny_host.randomize(demo_models.build_vae())
    settings = {"params": {"ddconfig": config.VAE, "embed_dim": config.VAE["z_channels"]}}
    vae = comfy.sd.VAE(sd=network.state_dict(), config=settings)
    latent = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    size = vae.decode(latent[:1]).shape[1:3]
    clip = Clip(3, *size, RATE, lambda: (vae.decode(frame[None]).cpu() for frame in latent))
    images = StreamedVideo(clip).get_components().images
    assert (images - vae.decode(latent).cpu()).abs().mean() < 1e-3
    StreamedVideo(clip).save_to(str(output / "vae.mp4"), crf=1)
    found = InputImpl.VideoFromFile(str(output / "vae.mp4")).get_components().images
    coarse = [torch.nn.functional.avg_pool2d(clip.movedim(3, 1), 8) for clip in (found, images)]
    assert found.shape == images.shape and (coarse[0] - coarse[1]).abs().mean() < 0.02


@pytest.mark.parametrize("class_type", ["SaveVideo", "LatentMotionSaveVideo"])
def test_full_disk_keeps_what_was_sampled(
    class_type: str, streams: dict, output: Path, run_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save fails with a sentence and leaves nothing; the second one does not sample again."""
    inputs = {} if class_type == "SaveVideo" else SAVE
    with monkeypatch.context() as patch:
        patch.setattr(write.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        result = run_graph(_graph(class_type, **inputs))
    error = next(data for event, data in result["messages"] if event == "execution_error")
    assert error["node_id"] == "save" and "no room left" in error["exception_message"]
    assert _files(output) == [] and torch.equal(streams["latent"], torch.ones(FRAMES, 4, 4, 6))
    assert run_graph(_graph(class_type, **inputs))["success"]
    assert streams["sampled"] == 1 and _files(output) == ["film_00001_.mp4"]


@pytest.mark.parametrize("class_type", ["SaveVideo", "LatentMotionSaveVideo"])
def test_cancel_in_the_middle(class_type: str, streams: dict, output: Path, run_graph: Graph) -> None:
    seen: list[int] = []

    def press(frame: int) -> None:
        seen.append(frame)
        if frame == 20:
            comfy.model_management.interrupt_current_processing(True)

    streams["source"] = Source(press)
    result = run_graph(_graph(class_type, **({} if class_type == "SaveVideo" else SAVE)))
    assert not result["success"] and "execution_interrupted" in [event for event, _ in result["messages"]]
    assert seen[-1] == 20, "it stops within one chunk"
    assert _files(output) == []
    streams["source"] = Source()
    assert streams["sampled"] == 1


SAVE = {"filename_prefix": "film", "format": "mp4 (H.264)", "quality": 80}


@pytest.mark.parametrize("form", video.FORMATS)
def test_save_in_every_format(form: str, streams: dict, output: Path, run_graph: Graph) -> None:
    streams["source"] = Source(frames=20)
    graph = _graph("LatentMotionSaveVideo", **(SAVE | {"format": form, "filename_prefix": "clips/film"}))
    assert run_graph(graph)["success"]
    graph["save"]["inputs"]["quality"] = 60
    shown = run_graph(graph)["outputs"]["save"]
    ending = {"animated": "webp", "png": ""}.get(form.split()[0], form.split()[0])
    if ending:
        assert _files(output) == [f"clips/film_0000{i}_.{ending}" for i in (1, 2)]
        assert list(shown["animated"]) == [True]
        assert shown["images"] == [{"filename": f"film_00002_.{ending}", "subfolder": "clips", "type": "output"}]
    else:
        assert _files(output) == [f"clips/film_0000{i}_/film_0000{i}_{j:05}.png" for i in (1, 2) for j in range(20)]
        first = {"filename": "film_00002_00000.png", "subfolder": "clips/film_00002_", "type": "output"}
        assert shown["images"][0] == first and len(shown["images"]) == 16 and "animated" not in shown
        assert "LatentMotionSaveVideo" in Image.open(output / _files(output)[0]).text["prompt"]


def test_metadata_can_be_left_out(
    streams: dict, output: Path, run_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video.args, "disable_metadata", True)
    assert run_graph(_graph("LatentMotionSaveVideo", **SAVE))["success"]
    with av.open(str(output / "film_00001_.mp4")) as container:
        assert "prompt" not in container.metadata


def test_a_path_outside_the_output_folder_is_refused(streams: dict, output: Path, run_graph: Graph) -> None:
    result = run_graph(_graph("LatentMotionSaveVideo", **(SAVE | {"filename_prefix": "../../film"})))
    assert not result["success"] and streams["source"].started == 0


@pytest.fixture
def recording(base_directory: Path) -> str:
    """A film of ten frames with a tone, in the host's input folder."""
    coarse = torch.rand(10, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1).movedim(1, 3)
    sound = sound_of_samples(torch.rand(1, 10000), 8000)
    path = Path(folder_paths.get_input_directory()) / "recording.mp4"
    StreamedVideo(clip_of_images(images, RATE, sound)).save_to(str(path))
    return path.name


def test_load_and_save_without_images(recording: str, output: Path, run_graph: Graph) -> None:
    graph = {
        "load": _node("LatentMotionLoadVideo", video_file=recording, **(LOAD | {"skip_frames": 2, "width": 24})),
        "save": _node("SaveVideo", video=["load", 0], filename_prefix="film", format="auto", codec="auto"),
    }
    assert run_graph(graph)["success"]
    saved = InputImpl.VideoFromFile(str(output / "film_00001_.mp4"))
    components = saved.get_components()
    assert components.images.shape == (8, 16, 24, 3) and components.frame_rate == RATE
    assert components.audio["waveform"].shape[-1] == pytest.approx(8000, abs=2100)


def test_loaded_frames_are_those_the_host_loads(recording: str, run_node: Callable) -> None:
    loaded, frames, rate = run_node("LatentMotionLoadVideo", video_file=recording, **LOAD)
    theirs = run_node("LoadVideo", file=recording)[0].get_components().images
    ours = run_node("GetVideoComponents", video=loaded)[0]
    assert (frames, rate) == (10, 8.0) and ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02


def test_a_changed_file_is_loaded_again(recording: str, pack_nodes: dict[str, type]) -> None:
    load, path = pack_nodes["LatentMotionLoadVideo"], Path(folder_paths.get_input_directory()) / recording
    before = load.fingerprint_inputs(video_file=recording, **LOAD)
    assert before == load.fingerprint_inputs(video_file=recording, **LOAD)
    path.write_bytes(path.read_bytes() + b"\0")
    assert before != load.fingerprint_inputs(video_file=recording, **LOAD)


def test_missing_files_and_sound_files_are_sentences(run_node: Callable, pack_nodes: dict[str, type]) -> None:
    assert "not in your input folder" in pack_nodes["LatentMotionLoadVideo"].validate_inputs(video_file="gone.mp4")
    path = Path(folder_paths.get_input_directory()) / "text.mp4"
    path.write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4 cannot be read"):
        run_node("LatentMotionLoadVideo", video_file="text.mp4", **LOAD)


def test_the_packs_own_clip_is_there_until_the_user_has_one_of_that_name(
    base_directory: Path, run_node: Callable
) -> None:
    name = "latentmotion_toy_clip.mp4"
    assert name in video.list_videos() and video.known_video(name) is True
    loaded, frames, rate = run_node("LatentMotionLoadVideo", video_file=name, **LOAD)
    assert (frames, rate, loaded.get_dimensions()) == (16, 8.0, (128, 128))
    assert len(loaded.get_components().images) == 16
    before, own = video.state_of(name), base_directory / "input" / name
    write.write(clip_of_images(torch.rand(3, 32, 32, 3), RATE), own, write.Format.MP4, write.Writing(80))
    try:
        assert run_node("LatentMotionLoadVideo", video_file=name, **LOAD)[1] == 3
        assert video.state_of(name) != before and video.list_videos().count(name) == 1
    finally:
        own.unlink()


def test_the_hosts_own_videos_are_read_lazily(recording: str) -> None:
    path = Path(folder_paths.get_input_directory()) / recording
    whole = InputImpl.VideoFromFile(str(path))
    clip = video.clip_of(whole)
    assert clip.frames == 10 and clip.sound.rate == 8000
    assert video.clip_of(InputImpl.VideoFromFile(BytesIO(path.read_bytes()))).frames == 10
    if hasattr(whole, "as_trimmed"):
        assert video.clip_of(whole.as_trimmed(0.5, 0.5)).frames == 4
    images = torch.rand(3, 8, 8, 3)
    made = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(5)))
    assert torch.equal(next(video.clip_of(made).chunks()), images) and video.clip_of(made).frame_rate == 5


@pytest.mark.parametrize(("start", "seconds", "expected"), [
    (0.0, 0.0, [0, 40]), (1.0, 0.0, [8, 40]), (1.0, 0.5, [8, 12]), (-1.0, 0.0, [32, 40]), (4.5, 9.0, [36, 40]),
])  # fmt: skip
def test_trimmed_without_decoding(start: float, seconds: float, expected: list[int]) -> None:
    source = Source()
    part = StreamedVideo(source.clip).as_trimmed(start, seconds)
    assert source.started == 0 and part.get_frame_count() == expected[1] - expected[0]
    components = part.get_components()
    assert torch.equal(components.images, source.pictures[slice(*expected)])
    assert components.audio["waveform"].shape[-1] == (expected[1] - expected[0]) * 1000


def test_parts_that_are_not_there() -> None:
    found = StreamedVideo(Source().clip)
    assert found.as_trimmed(5.0) is None
    assert found.as_trimmed(4.5, 9.0, strict_duration=True) is None


@pytest.mark.parametrize(("asked", "container", "codec"), [
    (("mp4", "auto"), "mov", "h264"), (("mkv", "auto"), "matroska", "h264"), (("webm", "auto"), "matroska", "av1"),
    (("mp4", "av1"), "mov", "av1"),
])  # fmt: skip
def test_what_newer_hosts_ask_for(asked: tuple[str, str], container: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"film.{asked[0]}"
    StreamedVideo(Source(frames=4).clip).save_to(str(path), *asked, crf=30.0, bit_depth=8, color_space="sRGB")
    with av.open(str(path)) as found:
        assert container in found.format.name and found.streams.video[0].codec.canonical_name == codec


def test_into_memory_and_by_the_ending() -> None:
    found = StreamedVideo(Source(frames=4).clip).get_stream_source()
    assert InputImpl.VideoFromFile(found).get_frame_count() == 4


@pytest.mark.parametrize("wrong", [{"format": "webm", "codec": "h264"}, {"color_space": "HDR"}, {"format": "ogg"}])
def test_what_cannot_be_written_is_a_sentence(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"Choose"):
        StreamedVideo(Source(frames=4).clip).save_to(str(tmp_path / "film.mp4"), **wrong)
    assert not list(tmp_path.iterdir())


def test_other_sound_in_place_of_the_videos_own(output: Path, streams: dict, run_graph: Graph) -> None:
    graph = _graph("LatentMotionSaveVideo", audio=["sound", 0], **SAVE)
    graph["sound"] = _node("EmptyAudio", duration=2.0, sample_rate=44100, channels=2)
    assert run_graph(graph)["success"]
    with av.open(str(output / "film_00001_.mp4")) as container:
        assert container.streams.audio[0].rate == 44100


@pytest.mark.parametrize("form", ["mp4 (H.264)", "webm (VP9)"])
@pytest.mark.parametrize("fps", [29.97, 30000 / 1001, 23.976, 0.3, 25.0])
def test_rates_of_the_hosts_own_videos_can_be_saved(fps: float, form: str, output: Path, run_node: Callable) -> None:
    """The host makes a fraction of a decimal whose numbers are larger than files hold."""
    video = run_node("CreateVideo", images=torch.rand(4, 32, 32, 3), fps=fps)[0]
    run_node("LatentMotionSaveVideo", video=video, **SAVE | {"format": form})
    (path,) = (path for path in output.rglob("*") if path.is_file())
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)
