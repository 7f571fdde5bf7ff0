"""What a user drags: a schema and one call each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host import paths
from .loading import Lacking, load_nodes, needed_by, report


class LatentMotionExtension(ComfyExtension):
    """Registers the pack's nodes, model folders and routes with the host, less those for which it lacks a part."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        paths.register_folders()
        lacking: Lacking = {}
        nodes = all_nodes(lacking)
        with needed_by(["the picture of windows on Sliding Context"], lacking):
            from ..host import routes

            routes.register_routes()
        report(lacking, working=len(nodes))
        return nodes


def all_nodes(lacking: Lacking) -> list[type[io.ComfyNode]]:
    """Every node of the pack that works on this host, in the order of the add-node menu; see `loading`."""
    makers = ("motion", "context", "travel", "decode", "video", "edit")
    return load_nodes([*makers, "dataset", "train", "tune", "demo"], lacking)
