"""What the page shows of a sampling run: the whole clip moving, and which window of which step is being worked on.

The host's own previewer keeps sending the first frame as before. Beside it the whole clip goes out as one small sheet
of pictures, which `js/moving_preview.js` plays through the front end's own preview event.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..sampling.sheet import Sheet, spread

KEY = "latentmotion_preview"
EVENT = "latentmotion.preview"
MOST_PICTURES = 16  # of a clip in one preview
PAUSE = 0.25  # seconds between two previews, at least
SHARE = 0.01  # of the sampling time that making previews may take
TEXT_PAUSE = 0.1  # seconds between two progress texts, at least


@dataclass(eq=False)
class Page:
    """The page that started the run, and the node on it that samples."""

    server: Any
    place: dict[str, Any]
    silent_until: float = 0.0

    def show(self, sheet: bytes, shape: Sheet) -> None:
        """Send pictures of the clip: a JPEG of `shape.count` tiles, row by row."""
        data = {**self.place, "count": shape.count, "columns": shape.columns, "rows": shape.rows,
                "sheet": base64.b64encode(sheet).decode("ascii")}  # fmt: skip
        self.server.send_sync(EVENT, data, self.server.client_id)

    def say(self, text: str) -> None:
        """Show a line on the node; of lines in quick succession only some."""
        now = time.perf_counter()
        if now >= self.silent_until:
            self.silent_until = now + TEXT_PAUSE
            self.server.send_progress_text(text, self.place["display_node_id"], self.server.client_id)


def watching_page() -> Page | None:
    """The page that waits for the node that runs now; None in tests and scripts, where nobody watches."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context = get_executing_context()
    if context is None or getattr(server, "client_id", None) is None:
        return None
    graph, node = get_progress_state().dynprompt, context.node_id
    place = {
        "node_id": node,
        "prompt_id": context.prompt_id,
        "display_node_id": graph.get_display_node_id(node),
        "parent_node_id": graph.get_parent_node_id(node),
        "real_node_id": graph.get_real_node_id(node),
    }
    return Page(server, place)


def show_previews(model: ModelPatcher) -> None:
    """Let runs of this clone preview the whole clip. Calling it again changes nothing."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, preview_run)


def preview_run(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Callable | None = None,
    *rest: Any,
    **kwargs: Any,
) -> Tensor:
    """Put the moving preview behind the host's callback, where the user has previews on and a page is there."""
    if callback is not None and args.preview_method != LatentPreviewMethod.NoPreviews:
        painter = painter_of(executor.class_obj.model_patcher.model.latent_format)
        page = watching_page()
        if painter is not None and page is not None:
            callback = MovingPreview(callback, page, painter)
    return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *rest, **kwargs)


def painter_of(latent_format: Any) -> Any:
    """The host's own way from a latent to approximate colours; None for formats without any."""
    if latent_format.latent_rgb_factors is None:
        return None
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    more = {} if reshape is None else {"latent_rgb_factors_reshape": reshape}
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    return latent_preview.Latent2RGBPreviewer(latent_format.latent_rgb_factors, bias, **more)


@dataclass(eq=False)
class MovingPreview:
    """The host's callback of a sampling run, and after it, now and then, the clip as it stands."""

    callback: Callable
    page: Page
    painter: Any
    due: float = 0.0

    def __call__(self, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        self.callback(step, x0, x, total)
        if time.perf_counter() < self.due:
            return
        frames = chosen_frames(x0)  # waits for the device, as the host's own preview just did
        began = time.perf_counter()
        if len(frames) > 1:
            self.page.show(*self.sheet(frames))
        now = time.perf_counter()
        self.due = now + max(PAUSE, (now - began) / SHARE)

    def sheet(self, frames: list[Tensor]) -> tuple[bytes, Sheet]:
        """Latents of single frames to a JPEG of their pictures, at the size of the latents."""
        pictures = [self.painter.decode_latent_to_preview(frame) for frame in frames]
        width, height = pictures[0].size
        shape = Sheet(len(pictures))
        whole = Image.new("RGB", (shape.columns * width, shape.rows * height))
        for number, picture in enumerate(pictures):
            column, row = shape.cell(number)
            whole.paste(picture, (column * width, row * height))
        data = BytesIO()
        whole.save(data, "JPEG", quality=90, subsampling=0)
        return data.getvalue(), shape


def chosen_frames(x0: Tensor) -> list[Tensor]:
    """Some frames of a clip, evenly spread, on the CPU: latents (f, c, h, w) or (1, c, t, h, w) of one frame each."""
    if getattr(x0, "is_nested", False):
        x0 = x0.tensors[0]  # picture and sound in one latent; the picture comes first
    axis = 2 if x0.ndim == 5 else 0
    if x0.ndim == 5:
        x0 = x0[:1]
    index = torch.tensor(spread(x0.shape[axis], MOST_PICTURES), device=x0.device)
    few = x0.index_select(axis, index).to("cpu", torch.float32)
    return list(few.split(1, axis))
