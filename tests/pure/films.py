"""Small clips and video files for the tests of reading and writing video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from latentmotion.media.clip import Clip, clip_of_images, sound_of_samples
from latentmotion.media.geometry import Frame
from latentmotion.media.read import read_clip
from latentmotion.media.timing import Selection

COLOURS = [(191, 191, 191), (191, 191, 0), (0, 191, 191), (0, 191, 0), (191, 0, 191), (191, 0, 0), (0, 0, 191),
           (16, 16, 16)]  # fmt: skip
BAR = 24


def colour_bars(height: int = 48, spare: int = 0) -> torch.Tensor:
    """The eight bars of a test card, 24 pixels each and the last one `spare` wider: (h, w, 3) in 0..1."""
    bars = torch.tensor(COLOURS).repeat_interleave(BAR, 0)
    bars = torch.cat([bars, bars[-1:].expand(spare, 3)])
    return (bars / 255.0).expand(height, -1, 3).contiguous()


def bars_error(pictures: torch.Tensor) -> float:
    """Largest difference from the bars, in 255ths, away from their edges. Shapes: (f, h, w, 3)."""
    centres = pictures[:, 4:-4, : BAR * 8].unflatten(2, (8, BAR))[:, :, :, 6:-6]
    return float((centres * 255 - torch.tensor(COLOURS, dtype=torch.float32)[:, None]).abs().max())


def clip(frames: int = 6, rate: Fraction = Fraction(24000, 1001), height: int = 48, spare: int = 0,
         tone: int = 0, channels: int = 2, marked: bool = False) -> Clip:  # fmt: skip
    """Colour bars, with a tone of that many Hz and a mark along the edge that makes all frames differ, if asked for."""
    sound = None
    if tone:
        time = torch.arange(round(44100 * frames / rate)) / 44100
        sound = sound_of_samples(0.5 * torch.sin(2 * torch.pi * tone * time).expand(channels, -1), 44100)
    pictures = colour_bars(height, spare).repeat(frames, 1, 1, 1)
    for number in range(frames if marked else 0):
        pictures[number, :2, 2 * number % 192 : 2 * number % 192 + 2] = 1.0
    return clip_of_images(pictures, rate, sound)


def grey_film(
    path: Path,
    stamps: list[int],
    unit: Fraction = Fraction(1, 1000),
    size: tuple[int, int] = (32, 64),
    turned: int = 0,
    top_left: bool = False,
    codec: str = "libx264",
    options: Any = None,
) -> Path:
    """A film whose frame number i, shown at stamps[i] units, is grey of the value 20 + 6 i; see `number_of`."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=30)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        stream.options = {"crf": "1"} if options is None else options
        if turned:
            stream.set_display_rotation(turned)
        for number, stamp in enumerate(stamps):
            pixels = np.full((*size, 3), 20 + 6 * number, np.uint8)
            if top_left:
                pixels[: size[0] // 2, : size[1] // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, unit
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def sounding_film(path: Path, pictures: str, tone: str, seconds: int, silent: int = 0) -> Path:
    """A film of 5 pictures a second with a tone of 48 kHz that rises all the time, from `silent` seconds on."""
    with av.open(str(path), "w") as output:
        stream, heard = output.add_stream(pictures, rate=5), output.add_stream(tone, rate=48000, layout="mono")
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        grey = np.full((64, 64, 3), 128, np.uint8)
        for second in range(seconds):
            for _ in range(5):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            if second >= silent:
                time = np.arange(second * 48000, (second + 1) * 48000) / 48000
                wave = (0.5 * np.sin(2 * np.pi * (200 + 5 * time) * time)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
                frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), second * 48000
                output.mux(heard.encode(frame))
        for encoder in (stream, heard):
            output.mux(encoder.encode(None))
    return path


def loaded(path: Path, frame: Frame | None = None, **wanted: object) -> Clip:
    return read_clip(path, path.name, Selection(**wanted), frame or Frame())


def film_of(path: Path, pictures: torch.Tensor, rate: int = 10) -> Path:
    """A film of pictures (f, h, w, 3) in 0..1."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=rate)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in (pictures * 255).round().byte().numpy():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def numbers_of(pictures: torch.Tensor) -> list[int]:
    """Which frames of `grey_film` these are."""
    return [round((float(picture[-4:, -4:].mean()) * 255 - 20) / 6) for picture in pictures]


def decode(path: Path) -> tuple[torch.Tensor, Any]:
    """Every picture of a film as PyAV itself gives it, in bt709, and its stream."""
    with av.open(str(path)) as container:
        frames = [frame.reformat(format="rgb24", dst_color_range=2, interpolation=0x46004).to_ndarray()
                  for frame in container.decode(video=0)]  # fmt: skip
        return torch.from_numpy(np.stack(frames)).float() / 255, container.streams.video[0]
