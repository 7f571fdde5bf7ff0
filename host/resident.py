"""A MODEL whose weights are where it computes, as a training run needs them."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..motion_modules.errors import TrainingError


def resident(model: ModelPatcher) -> ModelPatcher:
    """A clone of MODEL whose weights lie on its device while it is loaded, so that gradients can pass through them.

    Newer hosts keep the weights on the CPU on NVIDIA machines and compute with copies (dynamic VRAM). They load such a
    MODEL anew, without that, where its weights have to be worked on; its patches come along.
    Raises TrainingError where the host cannot, as for a MODEL that came from no file.
    """
    if not getattr(model, "is_dynamic", bool)():
        return model.clone()
    try:
        return model.get_non_dynamic_delegate()
    except (AttributeError, RuntimeError) as error:
        raise TrainingError("ComfyUI keeps the weights of this MODEL off its device (dynamic VRAM), and cannot load it "
                            f"otherwise ({error}). Start ComfyUI with --disable-dynamic-vram to train."
                            ) from error  # fmt: skip
