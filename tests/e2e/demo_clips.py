"""The pack's clips in a server's input folder, from which the canvas shows them on the node that loads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np

CLIPS = Path(__file__).resolve().parent.parent.parent / "demo" / "clips"


def provide_clips(base: Path) -> None:
    """Copy them into a server's base directory. A run would find them without."""
    (base / "input").mkdir(exist_ok=True)
    for clip in CLIPS.glob("*.mp4"):
        shutil.copy(clip, base / "input")


def provide_clip_with_tone(base: Path, name: str) -> None:
    """Put one of them, with a tone of 440 Hz as its sound, into a server's input folder."""
    (clip,) = CLIPS.glob("*.mp4")
    with av.open(str(clip)) as source, av.open(str(base / "input" / name), "w") as film:
        pictures = source.streams.video[0]
        video = film.add_stream_from_template(pictures)
        sound = film.add_stream("aac", rate=44100, layout="mono")
        times = np.arange(round(44100 * float(pictures.duration * pictures.time_base))) / 44100
        tone = (0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
        heard = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        heard.sample_rate, heard.pts = 44100, 0
        for packet in source.demux(pictures):
            if packet.dts is not None:
                packet.stream = video
                film.mux(packet)
        film.mux([*sound.encode(heard), *sound.encode(None)])
