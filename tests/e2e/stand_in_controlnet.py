"""Writes an untrained ControlNet for the demo models, for the workflow that needs one.

    COMFYUI_PATH=... python tests/e2e/stand_in_controlnet.py FILE

A process of its own, as it loads the host and the pack, which the process of the tests does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "latentmotion_toy_controlnet.safetensors"
SHIPPED = ROOT / "demo" / "weights" / "controlnet" / NAME


def provide_controlnet(base: Path, host: Path) -> None:
    """Put one into the models folder of a server's base directory, unless a trained one comes with the pack."""
    if not SHIPPED.is_file():
        command = [sys.executable, __file__, str(base / "models" / "controlnet" / NAME)]
        subprocess.run(command, env=os.environ | {"COMFYUI_PATH": str(host)}, check=True)


def write_controlnet(path: Path) -> None:
    """An untrained ControlNet whose last layers are not zero, so that its hints change the clip."""
    import torch
    from latentmotion.demo.autoencoder import initialise
    from latentmotion.host import demo_models
    from latentmotion.training.checkpoint import save_weights

    random = torch.Generator().manual_seed(0)
    unet = demo_models.build_unet()
    initialise(unet, random)
    network = demo_models.build_controlnet(unet.state_dict())
    initialise(network, random)
    save_weights(path, network.state_dict(), {})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    import pack

    pack.load_host(Path(os.environ["COMFYUI_PATH"]), "--cpu")
    pack.load_pack()
    write_controlnet(Path(sys.argv[1]))
