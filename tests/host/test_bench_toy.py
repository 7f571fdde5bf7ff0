"""What `bench toy` says and keeps while it measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from latentmotion.bench import toy


def test_sections_that_are_measured_outlive_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def breaks(bench: object, count: int) -> dict[str, float]:
        raise MemoryError("no room")

    monkeypatch.setattr(toy.Bench, "open", lambda *_: SimpleNamespace(sampling=toy.SAMPLING))
    monkeypatch.setattr(toy, "SECTIONS", {"image": lambda bench, count: {"toy.image": count / 4}, "t2v": breaks})
    path = tmp_path / "figures.json"
    with pytest.raises(MemoryError):
        toy.main(["--clips", "2", "--only", "image", "t2v", "--json", str(path)])
    assert json.loads(path.read_text()) == {"toy.image": 0.5}


def test_clips_are_those_of_the_captions_in_order_and_counted_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    moments = iter([0.0, 30.0, 70.0, 70.0, 100.0, 130.0, 130.0])
    monkeypatch.setattr(toy, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    bench = SimpleNamespace(sample=lambda model, words, seed, frames: [seed, frames])
    made = toy.clips(bench, None, "test", 4)
    assert made == [(words, [toy.FIRST_SEED + i, 16]) for i, words in enumerate(toy.captions("test", True, 4))]
    assert capsys.readouterr().out.split("\n")[:-1] == ["    2 of 4 clips", "    4 of 4 clips"]
