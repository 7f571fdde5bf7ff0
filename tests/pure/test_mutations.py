"""Mutilated state dicts: only a sentence may come out, and whatever is accepted must load whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import reference_motion as reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from latentmotion.motion_modules.animatediff.lora import parts_for, read_motion_lora
from latentmotion.motion_modules.animatediff.network import MotionModel
from latentmotion.motion_modules.animatediff.spec import MotionSpec
from latentmotion.motion_modules.errors import LatentMotionError
from motion_files import renamed
from torch import Tensor, nn

MUTATIONS = 500
SPEC = MotionSpec(specs.V2, (("down_blocks.0.motion_modules.0", 32), ("mid_block.motion_modules.0", 32),
                             ("up_blocks.0.motion_modules.0", 32), ("up_blocks.0.motion_modules.1", 32)), 8)
SHAPES = {name: tensor.shape for name, tensor in MotionModel(SPEC, nn, device="meta").state_dict().items()}
FORMS = ("original", "diffusers", "hotshot")


@functools.cache
def module() -> dict[str, Tensor]:
    tables = {f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe":
              torch.zeros(1, 8, 32) for slot, _ in SPEC.slots for i in range(2)}
    return reference.random_weights(SHAPES, 0) | tables


@functools.cache
def lora() -> dict[str, Tensor]:
    file = {}
    for slot, c in SPEC.slots:
        for projection in ("to_q", "to_out"):
            stem = f"{slot}.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.{projection}_lora"
            file |= {f"{stem}.down.weight": torch.ones(2, c), f"{stem}.up.weight": torch.ones(c, 2),
                     f"{stem}.alpha": torch.tensor(2.0)}
    return file


def in_form(file: dict[str, Tensor], form: str) -> dict[str, Any]:
    pairs = {"diffusers": (("temporal_transformer.", ""), ("attention_blocks.0.", "attn1."), ("norms.0.", "norm1.")),
             "hotshot": (("motion_modules", "temporal_attentions"), (".temporal_transformer", ""))}.get(form, ())
    return renamed(file, *pairs)


PIECES = ("down_blocks", "up_blocks", "mid_block", "motion_modules", "temporal_attentions", "temporal_transformer",
          "transformer_blocks", "attention_blocks", "norm", "norms", "to_q", "to_out", "ff", "proj_in", "pos_encoder",
          "pe", "lora", "weight", "bias", "alpha", "0", "1", "7", "00", "99999999999", "-1", "\u0663", "", "\n", "é",
          "conv_in", "img_encoder", "module", "unet", "state_dict", "processor", "resnets", "attn1", "down", "up")
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
          torch.uint8, torch.int64, torch.bool)
SHAPED = st.sampled_from([(), (0,), (1,), (2,), (31,), (64,), (0, 32), (32, 0), (32, 32, 1, 1), (1, 0, 32), (1, 24, 32),
                          (2, 8, 32), (8, 32), (3, 5), (320, 9, 3, 3)])
THINGS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=4),
                   st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
KEYS = st.one_of(st.text(max_size=6), st.integers(), st.none(),
                 st.lists(st.sampled_from(PIECES), max_size=6).map(".".join))


def drop(file: dict, key: Any, draw: Callable) -> None:
    del file[key]


def drop_many(file: dict, key: Any, draw: Callable) -> None:
    piece = draw(st.sampled_from(PIECES))
    for name in [name for name in file if piece in str(name)]:
        del file[name]


def rename(file: dict, key: Any, draw: Callable) -> None:
    pieces = str(key).split(".")
    place = draw(st.integers(0, len(pieces) - 1))
    pieces[place] = draw(st.sampled_from(PIECES))
    file[".".join(pieces)] = file.pop(key)


def rename_all(file: dict, key: Any, draw: Callable) -> None:
    old, new = draw(st.sampled_from(str(key).split("."))), draw(st.sampled_from(PIECES))
    items = list(file.items())
    file.clear()
    file.update({str(name).replace(old, new) if old else name: value for name, value in items})


def add(file: dict, key: Any, draw: Callable) -> None:
    file[draw(KEYS)] = draw(st.one_of(THINGS, SHAPED.map(torch.zeros)))


def reshape(file: dict, key: Any, draw: Callable) -> None:
    file[key] = torch.ones(draw(SHAPED))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.is_sparse or tensor.is_complex() else tensor.to(dtype)


def retype(file: dict, key: Any, draw: Callable) -> None:
    if isinstance(file[key], Tensor):
        file[key] = cast(file[key], draw(st.sampled_from(DTYPES)))


def retype_all(file: dict, key: Any, draw: Callable) -> None:
    dtype = draw(st.sampled_from(DTYPES))
    file.update({name: cast(value, dtype) if isinstance(value, Tensor) else value for name, value in file.items()})


def complicate(file: dict, key: Any, draw: Callable) -> None:
    file[key] = torch.zeros(32, 32, dtype=torch.complex64)


def transpose(file: dict, key: Any, draw: Callable) -> None:
    if isinstance(file[key], Tensor) and file[key].ndim == 2:
        file[key] = file[key].T


def swap(file: dict, key: Any, draw: Callable) -> None:
    other = draw(st.sampled_from(list(file)))
    file[key], file[other] = file[other], file[key]


def spoil(file: dict, key: Any, draw: Callable) -> None:
    if isinstance(file[key], Tensor):
        file[key] = torch.full(file[key].shape, draw(st.sampled_from([float("nan"), float("inf"), 3e38])))


def exchange(file: dict, key: Any, draw: Callable) -> None:
    file[key] = draw(THINGS)


def sparse(file: dict, key: Any, draw: Callable) -> None:
    file[key] = torch.eye(32).to_sparse()


def prefix(file: dict, key: Any, draw: Callable) -> None:
    front = draw(st.sampled_from(["module.", "unet.", "module.module.", "x.", "model.diffusion_model.", "."]))
    items = list(file.items())
    file.clear()
    file.update({f"{front}{name}": value for name, value in items})


def nest(file: dict, key: Any, draw: Callable) -> None:
    inner = dict(file)
    file.clear()
    file[draw(st.sampled_from(["state_dict", "controlnet", "model", "module", "other", 5, None]))] = inner
    if draw(st.booleans()):
        file["epoch"] = 3


ACTS = (drop, drop_many, rename, rename_all, add, reshape, retype, retype_all, transpose, swap, spoil, exchange, sparse,
        complicate, prefix, nest)


@st.composite
def mutilated(draw: Callable, whole: Callable[[], dict[str, Tensor]]) -> dict[Any, Any]:
    file = in_form(whole(), draw(st.sampled_from(FORMS)))
    for act in draw(st.lists(st.sampled_from(ACTS), max_size=4)):
        if file:
            act(file, draw(st.sampled_from(list(file))), draw)
    return file


QUIET = settings(max_examples=MUTATIONS, deadline=None, database=None, derandomize=True,
                 suppress_health_check=list(HealthCheck))


@QUIET
@given(mutilated(module))
def test_mutilated_modules(file: dict[Any, Any]) -> None:
    try:
        read = read_motion_module(file, "x.ckpt")
    except LatentMotionError as error:
        assert_sentence(error)
        return
    network = MotionModel(read.spec)
    network.load_state_dict(read.weights, strict=True)
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())
    assert read.spec.positions > 0 and read.spec.levels


@QUIET
@given(mutilated(lora))
def test_mutilated_loras(file: dict[Any, Any]) -> None:
    try:
        read = read_motion_lora(file, "x.ckpt")
        fitting = parts_for(read, SPEC, SHAPES)
    except LatentMotionError as error:
        assert_sentence(error)
        return
    for name, part in fitting.items():
        change = part.up.double() @ part.down.double() * (1.0 if part.alpha is None else part.alpha)
        assert change.shape == SHAPES[name] and torch.isfinite(change).all()


@QUIET
@given(mutilated(lora))
def test_mutilated_loras_taken_for_modules(file: dict[Any, Any]) -> None:
    try:
        read_motion_module(file, "x.ckpt")
    except LatentMotionError as error:
        assert_sentence(error)
    else:
        raise AssertionError("a MotionLoRA can never make a whole motion module")


@settings(QUIET, max_examples=100)
@given(mutilated(module))
def test_mutilated_modules_taken_for_loras(file: dict[Any, Any]) -> None:
    try:
        read_motion_lora(file, "x.ckpt")
    except LatentMotionError as error:
        assert_sentence(error)
    else:
        raise AssertionError("a motion module can never make a MotionLoRA")


def assert_sentence(error: LatentMotionError) -> None:
    text = str(error)
    assert text.startswith("x.ckpt") and text.rstrip().endswith((".", "t2v.")) and len(text) > 40


def test_the_whole_files_are_accepted() -> None:
    for form in FORMS:
        assert read_motion_module(in_form(module(), form), "x").spec.slots == SPEC.slots
        assert len(read_motion_lora(in_form(lora(), form), "x").parts) == 8
