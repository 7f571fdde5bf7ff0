"""`run.py train-demo` from nothing to the last file, with a single step of every stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latentmotion.bench.toy import Bench
from latentmotion.demo import config
from latentmotion.demo.captions import sentences
from latentmotion.demo.train import STAGES, main


def test_every_stage_follows_from_the_ones_before(tmp_path: Path, capsys: pytest.CaptureFixture):
    with torch.inference_mode(False):
        assert main(["--rehearse", "1", "--out", str(tmp_path)]) == 0
    trained = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")}
    committed = {path.relative_to(config.WEIGHTS) for path in config.WEIGHTS.rglob("*.safetensors")}
    assert committed <= trained
    bench, words = Bench.open(tmp_path), sentences("test", True)[0]
    for file in (config.ZOOM_IN_FILE, config.ZOOM_OUT_FILE):
        assert len(bench.sample(bench.video(lora=file), words, 1, frames=2)) == 2
    capsys.readouterr()
    assert main(["--rehearse", "1", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done already") == len(STAGES)
