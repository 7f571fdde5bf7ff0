"""What the pack's canvas extension asks the server for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from ..sampling.fuse import window_weights
from .options import sliding_context

SHOWN_WINDOWS = 64  # more could not be told apart on a node


def register_routes() -> None:
    """Add the pack's routes to a running server; without one, as in tests, do nothing."""
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/latentmotion/windows")(answer_windows)


async def answer_windows(request: web.Request) -> web.Response:
    """The windows that widgets of Sliding Context give, as JSON; a sentence and status 400 where they make no plan."""
    try:
        return web.json_response(plan_picture(request.query))
    except (KeyError, ValueError) as error:
        return web.json_response({"error": str(error)}, status=400)


def plan_picture(widgets: Mapping[str, str]) -> dict[str, Any]:
    """Windows of a clip with the weight of each frame, as shares of the largest.

    widgets: the node's widgets by name, and `frames`. Returns {"frames": n, "more": windows not shown, "windows":
    [[[frame, weight], ...], ...]}. Raises KeyError for a missing widget and ValueError for lengths that make no plan.
    """
    context = sliding_context(
        context_length=int(widgets["context_length"]),
        context_overlap=int(widgets["context_overlap"]),
        schedule=widgets["schedule"],
        context_stride=int(widgets["context_stride"]),
        closed_loop=widgets["closed_loop"] == "true",
        fuse=widgets["fuse"],
        noise=widgets["noise"],
    )
    frames = min(int(widgets["frames"]), 4096)
    windows = context.plan.windows(frames)
    rows = []
    for window in windows[:SHOWN_WINDOWS]:
        weights = window_weights(context.fuse, window, frames, context.plan.overlap, context.plan.loops)
        rows.append([[frame, weight / max(weights)] for frame, weight in zip(window, weights, strict=True)])
    return {"frames": frames, "more": max(0, len(windows) - SHOWN_WINDOWS), "windows": rows}
