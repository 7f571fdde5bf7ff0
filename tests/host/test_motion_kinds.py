"""Every published kind of motion module file goes through the nodes: loaded, logged, applied and sampled with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import folder_paths
import motion_files as files
import pytest
import tiny_host
import torch
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.spec import Variant
from motion_runs import Run, apply
from torch import Tensor

SD, XL = (32, 64, 128, 128), (32, 64, 128)
Make = Callable[[], Mapping[str, object]]
KINDS: dict[str, tuple[Variant, Make]] = {
    "v1": (specs.V1, lambda: files.module(SD, False, 24)),
    "v2": (specs.V2, lambda: files.module(SD, True, 32)),
    "v3": (specs.V3, lambda: files.module(SD, False, 32)),
    "SDXL": (specs.V3, lambda: files.module(XL, False, 32)),  # the beta is known by its full widths
    "HotshotXL": (specs.HOTSHOT_XL, lambda: files.hotshot(files.module(XL, False, 24))),
    "AnimateLCM": (specs.ANIMATE_LCM, lambda: files.plain(files.module(SD, True, None))),
    "diffusers": (specs.V2, lambda: files.diffusers(files.module(SD, True, 32))),
    "a training dump": (specs.V2, lambda: {"state_dict": files.prefixed(
        files.module(SD, True, 32) | files.image_unet(), "module."), "epoch": 1}),
    "another training dump": (specs.V2, lambda: {"model_state_dict": files.module(SD, True, 32), "epoch": 1}),
}  # fmt: skip


def cast(payload: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """The same file with its tensors in another type."""
    return {key: cast(value, dtype) if isinstance(value, Mapping) else
            value.to(dtype) if isinstance(value, Tensor) else value for key, value in payload.items()}  # fmt: skip


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pack_nodes: dict) -> Path:
    name = "animatediff_models"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, name,
                        ([str(tmp_path)], folder_paths.folder_names_and_paths[name][1]))  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_and_moves(kind: str, dtype: torch.dtype, folder: Path, run_node: Run,
                                    caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    variant, make = KINDS[kind]
    torch.save(cast(make(), dtype), folder / "module.ckpt")
    with caplog.at_level(logging.INFO):
        (module,) = run_node("LatentMotionLoadMotionModule", motion_module="module.ckpt")
    (line,) = [line for line in caplog.messages if line.startswith("module.ckpt: ")]
    assert module.spec.variant is variant and variant.name in line and "noise schedule" in line
    image = tiny_host.sdxl() if len(module.spec.levels) == 3 else tiny_host.sd15()
    still, moving = (tiny_host.sample(model, 4, steps=1) for model in (image, apply(run_node, image, module)))
    assert moving.isfinite().all() and not torch.equal(moving, still)
