"""Socket types of the pack's own; everything else is the host's."""

from __future__ import annotations

from comfy_api.latest import io

MotionModuleSocket = io.Custom("MOTION_MODULE")
LatentPathSocket = io.Custom("LATENT_PATH")
VideoDatasetSocket = io.Custom("VIDEO_DATASET")
CATEGORY = "latent motion"
