"""What a user drags: a schema and one call each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host import paths, routes
from . import context, dataset, decode, demo, edit, motion, train, travel, tune, video


class LatentMotionExtension(ComfyExtension):
    """Registers the pack's nodes, model folders and routes with the host."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        paths.register_folders()
        routes.register_routes()
        return all_nodes()


def all_nodes() -> list[type[io.ComfyNode]]:
    """Every node of the pack, in the order of the add-node menu."""
    makers = [*motion.NODES, *context.NODES, *travel.NODES, *decode.NODES, *video.NODES, *edit.NODES]
    return [*makers, *dataset.NODES, *train.NODES, *tune.NODES, *demo.NODES]
