"""Self-attention over frames, and GroupNorms over whole clips, on any image MODEL with the Stable Diffusion UNet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from comfy.ldm.modules import attention as host_attention
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, VideoResBlock
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..motion_modules.animatediff.spec import V2, JointNorms, MotionSpec
from ..motion_modules.errors import ClipError, ModelMismatchError
from ..motion_modules.tune_a_video.attention import Reach, attend
from .bounds import Bounds
from .inflate import KEY as MOTION
from .inflate import publish_clip, publish_window, window_indices
from .memory import windows_in
from .preview import show_previews
from .unet import inflated, joint_norms

KEY = "latentmotion_attention"
TUNED = "latentmotion_tuned"  # host/tuned.py attaches its frames under it
JOINT = JointNorms(resnet=True, out=True)
"""The norms that Tune-A-Video takes over a clip (reference sheet, section 1)."""
NO_FRAMES = (
    "The latent holds no frames. Set batch_size of the Empty Latent Image node to the number of frames, 16 for "
    "instance."
)


@dataclass(frozen=True)
class Extent:
    """What host/bounds.py asks about a change of the UNet: which blocks get a layer, which norms see whole clips."""

    joint: JointNorms = JointNorms()
    spec: MotionSpec = MotionSpec(V2, (), 0)
    settings: Any = field(default_factory=lambda: _Frames())

    @property
    def module(self) -> Extent:
        return self


@dataclass(frozen=True)
class _Frames:
    frames: int = 0


@dataclass(frozen=True, eq=False)
class FrameAttention:
    """Wraps the host's call of a model: inside it, self-attention sees the frames that `reach` names.

    joint_norm: the GroupNorms of residual layers and of the output take one mean and variance over a clip.
    frames: images per clip; 0: what Apply Motion Module says, or the whole batch.
    """

    reach: Reach = Reach.SPARSE
    joint_norm: bool = True
    frames: int = 0

    def __deepcopy__(self, memo: dict) -> FrameAttention:
        """Immutable, so copies of a run's options share it."""
        return self

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        base = executor.class_obj
        frames = clip_frames(base, x, options, self.frames)
        with self.on(base.diffusion_model, frames):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    @contextmanager
    def on(self, unet: UNetModel, frames: int) -> Iterator[None]:
        """While the context lasts, the UNet computes clips of so many frames."""
        blocks = (
            (holder, name, FrameBlock(block, self.reach, frames))
            for _, holder, name, block in transformer_blocks(unet)
            if self.reach is not Reach.OWN
        )
        norms = list(joint_norms(unet, JOINT)) if self.joint_norm else []
        with stand_ins(blocks), inflated(unet, (), norms, frames):
            yield


def apply_frame_attention(model: ModelPatcher, attention: FrameAttention) -> ModelPatcher:
    """Return a clone of MODEL with this attention; one that was set before is replaced, but 0 frames are those of a
    tuned network on it.

    Raises ModelMismatchError for models that are not image models of the Stable Diffusion kind.
    """
    check_image_unet(model.get_model_object("diffusion_model"), "ST-Attention")
    model = model.clone()
    attention = replace(attention, frames=attention.frames or (model.get_attachment(TUNED) or {"frames": 0})["frames"])
    extent = Extent(JOINT if attention.joint_norm else JointNorms(), settings=_Frames(attention.frames))
    install(model, KEY, attention, extent)
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, MOTION):
        model.set_attachments(MOTION, {"frames": attention.frames})
    return model


def install(model: ModelPatcher, key: str, call: Any, extent: Extent) -> None:
    """Hang a wrapper of the model's call on a clone, with what the host must know of clips and memory."""
    bounds = Bounds((extent,))
    for kind, *wrappers in (
        (WrappersMP.APPLY_MODEL, call),
        (WrappersMP.PREDICT_NOISE, publish_clip),
        (WrappersMP.CALC_COND_BATCH, publish_window, bounds.predict),
        (WrappersMP.OUTER_SAMPLE, bounds.sample),
        (WrappersMP.PREPARE_SAMPLING, bounds.prepare),
    ):
        model.remove_wrappers_with_key(kind, key)
        for wrapper in wrappers:
            model.add_wrapper_with_key(kind, key, wrapper)
    show_previews(model)


def check_image_unet(unet: Any, what: str) -> None:
    """Raise ModelMismatchError unless this is the UNet of an image model of the Stable Diffusion kind."""
    if not isinstance(unet, UNetModel):
        raise ModelMismatchError(
            f"{what} is for image models of the Stable Diffusion kind, and this MODEL is a "
            f"{type(unet).__name__}. Use an SD1.x, SD2.x or SDXL model."
        )
    if any(isinstance(module, VideoResBlock) for module in unet.modules()):
        raise ModelMismatchError(
            f"{what} is for image models, and this MODEL makes video by itself (Stable Video "
            "Diffusion). Use an SD1.x, SD2.x or SDXL model."
        )


def clip_frames(base: Any, x: Tensor, options: dict, own: int = 0) -> int:
    """Frames per clip of one call. own: what the node says, 0 for what the other nodes on this MODEL say.

    Raises ClipError when nodes disagree, or the batch holds no whole number of clips.
    """
    images = x.shape[0] // max(1, len(options.get("cond_or_uncond", (0,))))
    if images == 0:
        raise ClipError(NO_FRAMES)
    if window_indices(options) is not None:
        return images // windows_in(options)
    patcher = getattr(base, "current_patcher", None)
    told = patcher.get_attachment(MOTION) if patcher is not None else None
    others = own if told is None else told["frames"]
    if own and others != own:
        said = f"clips of {others} frames" if others else "the whole batch as one clip"
        raise ClipError(
            f"ST-Attention or Load Tuned Video Model is set to clips of {own} frames, and Apply Motion Module takes "
            f"{said}. Set frames to the same number on both."
        )
    frames = others or images
    if images % frames:
        raise ClipError(
            f"The batch holds {images} images, which {frames} frames per clip do not divide. Set frames "
            f"of ST-Attention or Load Tuned Video Model to 0 for one clip of {images} frames, or change the batch."
        )
    return frames


def transformer_blocks(unet: UNetModel) -> Iterator[tuple[SpatialTransformer, nn.Module, str, nn.Module]]:
    """(transformer, list that holds the block, name there, block) of every block with self-attention."""
    for transformer in unet.modules():
        if isinstance(transformer, SpatialTransformer):
            for name, block in transformer.transformer_blocks._modules.items():
                if not isinstance(block, BasicTransformerBlock) or not block.disable_self_attn:
                    yield transformer, transformer.transformer_blocks, name, block


@contextmanager
def stand_ins(places: Iterable[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """While the context lasts, other modules stand in these places, as (holder, name, module)."""
    saved: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for holder, name, module in list(places):
            saved.append((holder, name, holder._modules[name]))
            holder._modules[name] = module
        yield
    finally:
        for holder, name, module in reversed(saved):
            holder._modules[name] = module


class FrameBlock(nn.Module):
    """Stands for one transformer block during one call, and gives it the host's patch of its self-attention.

    What is to be attended to is kept here and not in the options of the call, whose guards a compiled UNet may drop.
    A replacement that another pack has set for the same block goes first.
    """

    def __init__(self, block: nn.Module, reach: Reach, frames: int) -> None:
        super().__init__()
        self.held = (block,)  # in a tuple: not a child, so the block keeps its one place in the UNet
        self.reach = reach
        self.frames = frames

    def forward(self, x: Tensor, context: Any = None, transformer_options: dict | None = None) -> Tensor:
        options, images = transformer_options or {}, x.shape[0]

        def over_frames(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return host_attention.optimized_attention(
                    q, k, v, extra["n_heads"], transformer_options=extra, attn_precision=extra["attn_precision"]
                )

            if k.shape[0] != q.shape[0]:  # HyperTile cuts queries into tiles, and keys into as many parts
                k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
            return attend(self.reach, self.frames, images, q, k, v, attention)

        replaced = options.get("patches_replace", {})
        ours = {options.get("block"): over_frames, **replaced.get("attn1", {})}
        options = {**options, "patches_replace": {**replaced, "attn1": ours}}
        return self.held[0](x, context=context, transformer_options=options)
