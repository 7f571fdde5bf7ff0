"""Damaged, cut and hostile files: each fault gets its own sentence, and nothing in a file is ever run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module, refuse_other_files, unwrap
from latentmotion.motion_modules.errors import CheckpointError
from latentmotion.motion_modules.files import read_outline, read_weights
from motion_files import bytes_of, module, motion_lora, prefixed
from safetensors.torch import save_file
from torch import Tensor

KEY = "up_blocks.2.motion_modules.2.temporal_transformer"
BLOCK = f"{KEY}.transformer_blocks.0"
TABLE = f"{BLOCK}.attention_blocks.0.pos_encoder.pe"
Change = Callable[[dict[str, Tensor]], object]


def put(key: str, tensor: Tensor) -> Change:
    return lambda file: file.update({key: tensor})


def drop(part: str) -> Change:
    return lambda file: [file.pop(key) for key in list(file) if part in key]


DAMAGED: dict[str, tuple[Change, str]] = {
    "a tensor lacks": (drop(f"{BLOCK}.ff_norm.bias"), r"lacks 1 tensors.*ff_norm\.bias"),
    "a tensor too many": (put(f"{KEY}.extra", torch.zeros(1)), r"unknown 1 tensors.*extra"),
    "a second block": (put(f"{KEY}.transformer_blocks.1.ff_norm.bias", torch.zeros(64)), "unknown"),
    "a shape is wrong": (put(f"{KEY}.proj_in.weight", torch.zeros(3, 64)), r"shape \(3, 64\) where \(64, 64\)"),
    "NaN": (put(f"{BLOCK}.ff.net.2.weight", torch.full((64, 256), float("nan"))), r"ff\.net\.2\.weight holds NaN"),
    "one infinity": (put(f"{KEY}.proj_out.bias", torch.tensor([0.0] * 63 + [-float("inf")])), "holds NaN or inf"),
    "whole numbers": (put(f"{KEY}.proj_in.bias", torch.zeros(64, dtype=torch.int8)), r"torch\.int8 numbers; weights"),
    "a module lacks": (drop(KEY), "do not make a whole motion"),
    "a block lacks": (drop("up_blocks.3"), "do not make a whole motion"),
    "only down blocks": (drop("up_blocks"), "do not make a whole motion"),
    "tables of two lengths": (put(TABLE, torch.zeros(1, 24, 64)), r"different lengths \(\[24, 32\]\)"),
    "a flat table": (put(TABLE, torch.zeros(32, 64)), r"shape \(32, 64\) where \(1, frames, channels\)"),
    "an empty table": (put(TABLE, torch.zeros(1, 0, 64)), r"shape \(1, 0, 64\)"),
    "odd width": (put(f"{KEY}.norm.weight", torch.ones(40)), "40 channels wide.*32 norm groups"),
    "no width": (put(f"{KEY}.norm.weight", torch.ones(0)), "0 channels wide"),
    "an attention far out": (put(f"{BLOCK}.attention_blocks.99999999.to_q.weight", torch.zeros(1)), "no complete"),
    "only one tensor": (lambda f: [f.pop(k) for k in list(f) if k != f"{KEY}.proj_in.bias"], "no complete block"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_modules_say_what_is_wrong(damage: str) -> None:
    change, sentence = DAMAGED[damage]
    file = module()
    change(file)
    with pytest.raises(CheckpointError, match=f"^mm.ckpt: .*{sentence}"):
        read_motion_module(file, "mm.ckpt")


class Evil:
    """Runs a command when unpickled by anything but a tensors-only reader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}, None], ids=["zip", "legacy", "bare"])
@pytest.mark.parametrize("ending", ["ckpt", "pth", "safetensors"])
def test_a_pickle_with_code_is_not_run(how: dict | None, ending: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "owned", tmp_path / f"evil.{ending}"
    payload = {"a": torch.zeros(2), "b": Evil(mark)}
    path.write_bytes(pickle.dumps(Evil(mark)) if how is None else bytes_of(payload, **how))
    with pytest.raises(CheckpointError, match="evil.*more than tensors, so it is not opened. Convert it once"):
        read_weights(path)
    assert not mark.exists()


def safetensors_bytes(tmp_path: Path) -> bytes:
    save_file(module((32,)), tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


UNREADABLE: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "safetensors cut in the weights": ("a.safetensors", lambda t: safetensors_bytes(t)[:-100], "as safetensors.*cut"),
    "safetensors cut in the header": ("a.safetensors", lambda t: safetensors_bytes(t)[:200], "as safetensors.*cut"),
    "safetensors cut to a few bytes": ("a.safetensors", lambda t: b"\x10\x00", "as safetensors.*cut short"),
    "zip cut": ("a.ckpt", lambda t: bytes_of(module((32,)))[:5000], "cannot be read .*cut short"),
    "legacy cut": ("a.ckpt", lambda t: bytes_of(module((32,)), _use_new_zipfile_serialization=False)[:5000],
                   "cut short"),
    "legacy cut in its magic": ("a.ckpt", lambda t: bytes_of({}, _use_new_zipfile_serialization=False)[:120],
                                "cut short"),
    "empty file": ("a.ckpt", lambda t: b"", "a.ckpt is empty. Download it again"),
    "empty safetensors": ("a.safetensors", lambda t: b"", "a.safetensors is empty. Download it again"),
    "web page": ("a.safetensors", lambda t: b"\n <!DOCTYPE html><html></html>", "is a web page"),
    "Git LFS placeholder": ("a.ckpt", lambda t: b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS place"),
    "text": ("a.ckpt", lambda t: b"hello there, no weights here", "is not a file of weights"),
    "a list": ("a.ckpt", lambda t: bytes_of([torch.zeros(1)]), "holds a list where named tensors are needed"),
    "one tensor": ("a.ckpt", lambda t: bytes_of(torch.zeros(1)), "holds a Tensor where named tensors are needed"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_files_get_a_sentence(kind: str, tmp_path: Path) -> None:
    name, make, sentence = UNREADABLE[kind]
    (tmp_path / name).write_bytes(make(tmp_path))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.ckpt does not exist any more"):
        read_weights(tmp_path / "gone.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("source", ["zip", "legacy", "safetensors"])
def test_bytes_changed_at_random_never_crash(source: str, tmp_path: Path) -> None:
    whole = {"zip": lambda: bytes_of(motion_lora()), "safetensors": lambda: safetensors_bytes(tmp_path)[:20_000],
             "legacy": lambda: bytes_of(motion_lora(), _use_new_zipfile_serialization=False)}[source]()
    path, generator = tmp_path / "x.ckpt", torch.Generator().manual_seed(0)
    for _ in range(150):
        changed = bytearray(whole)
        for place, value in torch.randint(0, 2**31, (3, 2), generator=generator).tolist():
            changed[place % min(len(changed), 900)] = value % 256
        path.write_bytes(changed)
        try:
            read_motion_module(read_weights(path), path.name)
        except CheckpointError:
            continue


def test_outline_is_read_without_the_weights(tmp_path: Path) -> None:
    file, path = prefixed(module((32,)), "module."), tmp_path / "m.safetensors"
    save_file(file, path, metadata={"format": "pt"})
    outline = read_outline(path)
    assert {n: t.shape for n, t in outline.items()} == {n: t.shape for n, t in file.items()}
    assert all(tensor.is_meta for tensor in outline.values())
    refuse_other_files(unwrap(outline), path.name)


@pytest.mark.parametrize("content", [b"", b"\x05\x00", b"\x02\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 1}',
                                     b"\xff" * 16, b"\x04\0\0\0\0\0\0\0\xff\xfe\xff\xfe", b"\x02\0\0\0\0\0\0\x01{}"])
def test_outline_of_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="m.safetensors"):
        read_outline(path)
