"""The moving preview: what is sent to the page that waits, when, and that a run draws the same with and without it."""

from __future__ import annotations

import base64
import io
import itertools
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_management
import latent_preview
import pytest
import tiny_host
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import CurrentNodeContext
from helpers_motion import Pair
from latentmotion.host import preview
from latentmotion.host.context import SlidingContext, apply_context
from latentmotion.host.reuse import apply_reuse
from latentmotion.motion_modules.animatediff.network import FeedForward
from latentmotion.sampling.reuse import Reuse
from latentmotion.sampling.sheet import Sheet, spread
from latentmotion.sampling.windows import WindowPlan
from PIL import Image
from torch import Tensor

pytest_plugins = ["helpers_fixtures"]

FRAMES = 6


class Server:
    """Keeps what a run sends to the page."""

    client_id = "page"

    def __init__(self) -> None:
        self.previews: list[dict[str, Any]] = []
        self.texts: list[tuple[str, str]] = []

    def send_sync(self, event: str, data: dict[str, Any], sid: str) -> None:
        assert (event, sid) == ("latentmotion.preview", "page")
        self.previews.append(data)

    def send_progress_text(self, text: str, node_id: str, sid: str) -> None:
        assert sid == "page"
        self.texts.append((text, node_id))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A page waits for node 7, with previews on and no time between them."""
    server = Server()
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(preview, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(preview, "SHARE", 100)
    with CurrentNodeContext("prompt", "7"):
        yield server


def heard(told: list) -> Any:
    return lambda step, x0, x, total: told.append((step, total, x0))


def tiles(sent: dict[str, Any]) -> list[Image.Image]:
    """The pictures on a sheet."""
    whole = Image.open(io.BytesIO(base64.b64decode(sent["sheet"])))
    width, height = whole.width // sent["columns"], whole.height // sent["rows"]
    shape = Sheet(sent["count"])
    corners = [(column * width, row * height) for column, row in map(shape.cell, range(sent["count"]))]
    return [whole.crop((left, top, left + width, top + height)) for left, top in corners]


def distance(a: Image.Image, b: Image.Image) -> float:
    one, other = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in (a, b))
    return float((one - other).abs().mean())


def test_every_frame_of_the_clip_is_sent_after_the_hosts_own_preview(pair: Pair, page: Server) -> None:
    told: list = []
    tiny_host.sample(pair.video(), FRAMES, callback=heard(told))
    assert [entry[:2] for entry in told] == [(0, 2), (1, 2)], "the host's callback hears of every step"
    assert len(page.previews) == 2
    host = preview.painter_of(pair.plain.model.latent_format)
    for (_, _, x0), sent in zip(told, page.previews, strict=True):
        assert (sent["node_id"], sent["display_node_id"], sent["prompt_id"]) == ("7", "7", "prompt")
        pictures = tiles(sent)
        assert len(pictures) == FRAMES
        for number, picture in enumerate(pictures):  # in the colours in which the host shows a first frame
            expected = host.decode_latent_to_preview(x0[number:])
            assert distance(picture, expected) < 12
        assert distance(pictures[0], pictures[-1]) > 15, "the clip of a random model moves"


def test_previews_change_no_bit_of_the_clip(pair: Pair, page: Server) -> None:
    model = pair.video()
    shown = tiny_host.sample(model, FRAMES, callback=heard([]))
    assert page.previews
    page.client_id = None
    assert torch.equal(shown, tiny_host.sample(model, FRAMES, callback=heard([])))


@pytest.mark.parametrize("why", ["the user has them off", "no page waits", "no server runs", "nobody listens"])
def test_no_preview(why: str, pair: Pair, page: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "the user has them off":
        monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    if why == "no page waits":
        monkeypatch.setattr(page, "client_id", None)
    if why == "no server runs":
        monkeypatch.delitem(sys.modules, "server")
    tiny_host.sample(pair.video(), FRAMES, steps=1, callback=None if why == "nobody listens" else heard([]))
    assert not page.previews


def test_the_image_model_is_previewed_by_the_host_alone(pair: Pair, page: Server) -> None:
    pair.video()
    tiny_host.sample(pair.plain, FRAMES, steps=1, callback=heard([]))
    assert not page.previews


def test_previews_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only making a sheet moves, by 0.02 s, and each step, by 0.1 s."""
    now, shown = [0.0], []
    monkeypatch.setattr(preview, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def sheet(frames: list[Tensor]) -> tuple[bytes, Sheet]:
        now[0] += 0.02
        return b"", Sheet(len(frames))

    watched = SimpleNamespace(show=lambda data, shape: shown.append(now[0]))
    moving = preview.MovingPreview(lambda *told: None, watched, None)
    moving.sheet = sheet
    for step in range(200):
        now[0] += 0.1
        moving(step, torch.zeros(4, 4, 2, 2), torch.zeros(4, 4, 2, 2), 200)
    assert 5 <= len(shown) <= 0.02 * 200 * 0.1 / 0.02, "each 0.02 s of work is followed by 2 s without"


def test_long_clips_are_shown_in_part(pair: Pair) -> None:
    assert spread(40, 16)[0] == 0 and spread(40, 16)[-1] == 39 and len(set(spread(40, 16))) == 16
    x0 = torch.arange(40.0)[:, None, None, None].expand(40, 4, 2, 2)
    assert [float(frame.max()) for frame in preview.chosen_frames(x0)] == spread(40, 16)
    one = preview.chosen_frames(x0.movedim(0, 1)[None])  # (1, c, t, h, w)
    assert [tuple(frame.shape) for frame in one] == [(1, 4, 1, 2, 2)] * 16
    assert [float(frame.max()) for frame in one] == spread(40, 16)


@pytest.mark.parametrize("latent_format", [comfy.latent_formats.SD15(), comfy.latent_formats.Wan21()])
def test_host_formats_are_painted_as_the_host_paints_them(latent_format: Any) -> None:
    shape = (1, 16, 3, 4, 4) if latent_format.latent_dimensions == 3 else (3, 4, 4, 4)
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    host = latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    own = preview.painter_of(latent_format).decode_latent_to_preview(preview.chosen_frames(x0)[0])
    assert own.tobytes() == host.decode_latent_to_preview(x0).tobytes()


def without_memory(page: Server, frames: int) -> list[str]:
    """Lines of node 7 after the first, which says how much memory `frames` frames take and is taken off the others."""
    assert {node for _, node in page.texts} == {"7"}
    first, *texts = (text for text, _ in page.texts)
    found = re.fullmatch(rf"{frames} frames at once(, about [1-9]\d* MiB) of \d+ MiB free", first)
    assert found and all(text.endswith(found[1]) for text in texts)
    return [text.removesuffix(found[1]) for text in texts]


def test_progress_text_names_window_and_step(pair: Pair, page: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    tiny_host.sample(apply_context(pair.video(), SlidingContext(WindowPlan(length=4, overlap=2))), FRAMES)
    assert without_memory(page, 4) == [f"window {k}/2, step {step}/2" for step in (1, 2) for k in (1, 2)]
    assert not page.previews


def test_progress_text_says_that_memory_ran_out(pair: Pair, page: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = FeedForward.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(1)
            raise comfy.model_management.OOM_EXCEPTION("injected")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FeedForward, "forward", failing)
        tiny_host.sample(apply_context(pair.video(), SlidingContext(WindowPlan(length=4, overlap=2))), FRAMES, steps=1)
    said = [text.endswith(", in smaller pieces since it ran out") for text, _ in page.texts]
    assert said == [False, False, True], "from the window behind the one that ran out"


def test_progress_text_names_clip_and_step(pair: Pair, page: Server) -> None:
    tiny_host.sample(apply_reuse(pair.video(), Reuse(3, 1)), FRAMES, steps=2, callback=heard([]))
    assert without_memory(page, 3) == [f"clip {clip}/2, step {step}/2" for clip in (1, 2) for step in (1, 2)]
    assert [sent["count"] for sent in page.previews] == [3, 3, 3, 6], "the clip that is made, at the end all of them"
