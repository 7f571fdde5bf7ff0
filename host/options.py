"""What the choices on the nodes mean, and the checks a node makes before anything runs.

A function imports what it makes by itself: a part that the host lacks then costs only the nodes that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..motion_modules.animatediff.spec import Schedule
from ..motion_modules.errors import CheckpointError, check_choice
from ..motion_modules.temporal_vae.decode import EXACT, STREAMING
from ..motion_modules.tune_a_video.attention import Reach
from ..motion_modules.tune_a_video.checkpoint import QUERIES
from ..sampling.frame_values import FrameValueError, FrameValues, frame_values, parse_frame_values
from ..sampling.fuse import FuseMethod
from ..sampling.noise import NoiseKind
from ..sampling.reuse import Guidance, Reuse
from ..sampling.windows import PlanError, WindowPlan, WindowSchedule
from ..training.recipe import OPTIMISERS, Recipe
from . import paths
from .train_words import ALL_ALIKE, ALL_LAYERS, LEVELS

if TYPE_CHECKING:
    from .attention import FrameAttention
    from .context import SlidingContext
    from .inflate import MotionSettings
    from .motion import MotionModule
    from .train import LoraTraining
    from .train_stages import ModuleTraining
    from .tune import Tuning
    from .vae import DecodeSettings

AS_TRAINED = "as trained"
MODELS_OWN = "image model's own"
SCHEDULES = [AS_TRAINED, MODELS_OWN, *(schedule.value for schedule in Schedule)]
STRETCH = "stretch"
POSITIONS = [AS_TRAINED, STRETCH]
AS_EVOLVED = "as AnimateDiff-Evolved"
GROUP_NORMS = [AS_TRAINED, AS_EVOLVED]
HOSTS_OWN, PYTORCH = "ComfyUI's own", "PyTorch's"
ATTENTIONS = [HOSTS_OWN, PYTORCH]
WINDOW_SCHEDULES = [schedule.value for schedule in WindowSchedule]
FUSE_METHODS = [method.value for method in FuseMethod]
NOISE_KINDS = [kind.value for kind in NoiseKind]
GUIDANCES = [guidance.value for guidance in Guidance]
DECODE_MODES = [EXACT, STREAMING]
REACHES = [reach.value for reach in Reach]
GO_ON, START_OVER = "go on", "start over"
EXISTING = [GO_ON, START_OVER]
V3_LAYOUT, V2_LAYOUT = "AnimateDiff v3", "AnimateDiff v2 (middle block too)"
CONVOLUTION_LAYOUT = "temporal convolution (ablation)"
NOISE_LEVELS = [*LEVELS]
OPTIMISER_NAMES = [*OPTIMISERS]
LAYOUTS = [V3_LAYOUT, V2_LAYOUT, CONVOLUTION_LAYOUT]
MODULE_STATE_S = 1800.0  # the state of a motion module is some 7 GB


def known_file(folder: str, name: str | None, kind: str = "") -> bool | str:
    """True, or the sentence for a workflow that names a file the user lacks; None (linked) is not known yet."""
    return True if name is None or name in paths.list_files(folder) else paths.missing_file(folder, name, kind)


def known_range(start: float | None, end: float | None) -> bool | str:
    """True, or the sentence for a part of the sampling run that is empty or out of bounds.

    None stands for a number that comes over a link and is not known before the run.
    """
    start, end = 0.0 if start is None else start, 1.0 if end is None else end
    if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0):
        return f"start_percent ({start}) and end_percent ({end}) must lie between 0 and 1."
    if start >= end:
        return (
            f"start_percent ({start}) is not below end_percent ({end}), so the motion module would never act. "
            "Lower start_percent or raise end_percent."
        )
    return True


def settings(
    module: MotionModule,
    *,
    strength: float,
    motion_scale: float,
    start_percent: float,
    end_percent: float,
    noise_schedule: str,
    frames: int,
    positions: str,
    group_norm: str,
    strength_per_frame: Any = None,
    motion_scale_per_frame: Any = None,
    image_attention: str = HOSTS_OWN,
) -> MotionSettings:
    """Translate the widgets of Apply Motion Module. Raises ValueError for values that cannot be read.

    Some hosts do not check the choices of V3 nodes, so a workflow written by hand may bring any text.
    """
    from .inflate import MotionSettings

    for name, choice, known in (
        ("noise_schedule", noise_schedule, SCHEDULES),
        ("positions", positions, POSITIONS),
        ("group_norm", group_norm, GROUP_NORMS),
        ("image_attention", image_attention, ATTENTIONS),
    ):
        check_choice(name, choice, known)
    possible = known_range(start_percent, end_percent)
    if possible is not True:
        raise ValueError(possible)
    return MotionSettings(
        strength=_per_frame("strength", strength, strength_per_frame),
        scale=_per_frame("motion_scale", motion_scale, motion_scale_per_frame),
        start=start_percent,
        end=end_percent,
        frames=frames,
        stretch=positions == STRETCH,
        as_evolved=group_norm == AS_EVOLVED,
        schedule=_schedule(module, noise_schedule),
        torch_attention=image_attention == PYTORCH,
    )


def _per_frame(name: str, number: float, value: Any) -> FrameValues:
    """A widget and the input for its values per frame. Raises ValueError that names the one that cannot be read."""
    try:
        return frame_values(number, parse_frame_values(value) if isinstance(value, str) else value)
    except FrameValueError as error:
        raise ValueError(f"{name}_per_frame: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _schedule(module: MotionModule, choice: str) -> Schedule | None:
    if choice == AS_TRAINED:
        return module.spec.variant.schedule
    return None if choice == MODELS_OWN else Schedule(choice)


def known_windows(length: int | None, overlap: int | None, stride: int | None) -> bool | str:
    """True, or the sentence for window settings that no clip could be planned with; None (linked) is not known yet."""
    if None in (length, overlap, stride):
        return True
    try:
        WindowPlan(length=length, overlap=overlap, stride=stride)
    except PlanError as error:
        return str(error)
    return True


def sliding_context(
    *,
    context_length: int,
    context_overlap: int,
    schedule: str,
    context_stride: int,
    closed_loop: bool,
    fuse: str,
    noise: str,
) -> SlidingContext:
    """Translate the widgets of Sliding Context. Raises PlanError for lengths that make no plan."""
    from .context import SlidingContext

    plan = WindowPlan(WindowSchedule(schedule), context_length, context_overlap, context_stride, closed_loop)
    return SlidingContext(plan, FuseMethod(fuse), NoiseKind(noise))


def known_reuse(length: int | None, prompt_frames: int | None) -> bool | str:
    """True, or the sentence for more prompt frames than a clip has; None (linked) is not known yet."""
    if None in (length, prompt_frames):
        return True
    try:
        Reuse(length, prompt_frames)
    except PlanError as error:
        return str(error)
    return True


def reuse_settings(*, clip_length: int, prompt_frames: int, alpha: float, beta: float, guidance: str) -> Reuse:
    """Translate the widgets of Reuse and Diffuse. Raises PlanError for settings that no clip can follow."""
    check_choice("guidance", guidance, GUIDANCES)
    return Reuse(clip_length, prompt_frames, alpha, beta, Guidance(guidance))


def decoding(*, mode: str, chunk_frames: int, clip_length: int) -> DecodeSettings:
    """Translate the widgets of Temporal VAE Decode. Raises ValueError for a mode that does not exist."""
    from .vae import DecodeSettings

    check_choice("mode", mode, DECODE_MODES)
    return DecodeSettings(mode, max(1, chunk_frames), clip_length)


def lora_training(
    *,
    file_name: str,
    rank: int,
    alpha: float,
    steps: int,
    learning_rate: float,
    frames: int,
    stride: int,
    clip_length: int,
    high_noise_weight: float = 1.0,
    layers: str = "",
    noise_levels: str = ALL_ALIKE,
    frames_seen: int = 0,
    **run: Any,
) -> LoraTraining:
    """Translate the widgets of Train MotionLoRA. Raises ValueError for values that cannot be used."""
    from .train import LoraTraining

    check_choice("noise_levels", noise_levels, NOISE_LEVELS)
    trains = tuple(layers.replace(",", " ").split()) or (ALL_LAYERS,)
    recipe = _lora_recipe("MotionLoRA", steps, learning_rate, ceiling=high_noise_weight, trains=trains,
                          levels=LEVELS[noise_levels], frames_seen=frames_seen, **_batches(run))  # fmt: skip
    path = paths.new_file(paths.MOTION_LORAS, file_name)
    clips = {"frames": frames, "stride": stride, "clip_length": clip_length}
    return LoraTraining(path=path, recipe=recipe, rank=rank, alpha=alpha, **clips, **_running(**run))


def adapter_training(*, file_name: str, rank: int, steps: int, learning_rate: float, **run: Any) -> LoraTraining:
    """Translate the widgets of Train Domain Adapter. Raises ValueError for values that cannot be used."""
    from .train import LoraTraining

    trains = ("attn1.to_", "attn2.to_")
    recipe = _lora_recipe("domain adapter", steps, learning_rate, trains=trains, **_batches(run))
    path = paths.new_file("loras", file_name)
    return LoraTraining(path=path, recipe=recipe, rank=rank, alpha=rank, **_running(**run))


def module_training(
    *,
    file_name: str,
    layout: str,
    steps: int,
    learning_rate: float,
    frames: int,
    stride: int,
    clip_length: int,
    high_noise_weight: float = 1.0,
    noise_levels: str = ALL_ALIKE,
    frames_seen: int = 0,
    optimiser: str = "AdamW",
    **run: Any,
) -> ModuleTraining:
    """Translate the widgets of Train Motion Module: constant learning rate, no averaging, as AnimateDiff's code has it.

    Raises ValueError for values that cannot be used.
    """
    from .train_stages import ModuleTraining

    check_choice("layout", layout, LAYOUTS)
    check_choice("noise_levels", noise_levels, NOISE_LEVELS)
    recipe = Recipe("motion module", steps, learning_rate=learning_rate, warmup=0, final_rate=1.0, average=0.0,
                    beta2=0.999, ceiling=high_noise_weight, levels=LEVELS[noise_levels], frames_seen=frames_seen,
                    trains=("motion_modules.",), optimiser=optimiser, **_batches(run))  # fmt: skip
    path = paths.new_file(paths.MOTION_MODULES, file_name)
    clips = {"frames": frames, "stride": stride, "clip_length": clip_length}
    how = _running(**run) | {"save_every_s": MODULE_STATE_S}
    convolves = layout == CONVOLUTION_LAYOUT
    return ModuleTraining(path=path, recipe=recipe, with_mid=layout == V2_LAYOUT, convolves=convolves, **clips, **how)


def _lora_recipe(name: str, steps: int, learning_rate: float, **more: Any) -> Recipe:
    return Recipe(name, steps, learning_rate=learning_rate, warmup=min(100, steps // 10), weight_decay=0.0,
                  average=0.98, **more)  # fmt: skip


def _batches(run: dict[str, Any]) -> dict[str, int]:
    """The widgets of a run that its recipe holds."""
    return {"batch": run.pop("batch_size"), "accumulate": run.pop("accumulate"), "seed": run.pop("seed")}


def _running(*, gradient_checkpointing: bool, save_every: int, existing: str, sample_every: int) -> dict[str, Any]:
    check_choice("existing", existing, EXISTING)
    return {"recompute": gradient_checkpointing, "save_every": save_every, "sample_every": sample_every,
            "go_on": existing == GO_ON}  # fmt: skip


def tuning(
    *,
    file_name: str,
    steps: int,
    learning_rate: float,
    frames: int,
    stride: int,
    seed: int,
    base_name: str = "",
    **run: Any,
) -> Tuning:
    """Translate the widgets of Tune Video Model. Raises ValueError for values that cannot be used."""
    from .tune import Tuning

    recipe = Recipe("Tune-A-Video", steps, 1, learning_rate, warmup=0, final_rate=1.0, average=0.0, seed=seed,
                    beta2=0.999, trains=(*QUERIES, "attn_temp"))  # fmt: skip
    path = paths.new_file(paths.MOTION_MODULES, file_name)
    return Tuning(path=path, recipe=recipe, frames=frames, stride=stride, base_name=base_name, **_running(**run))


def frame_attention(*, keys_from: str, joint_group_norm: bool, frames: int) -> FrameAttention:
    """Translate the widgets of ST-Attention. Raises ValueError for a choice that does not exist."""
    from .attention import FrameAttention

    check_choice("keys_from", keys_from, REACHES)
    return FrameAttention(Reach(keys_from), joint_group_norm, frames)


def known_new_file(folder: str, name: str | None) -> bool | str:
    """True, or the sentence for a file name that cannot be written; None (linked) is not known yet."""
    try:
        return name is None or bool(paths.new_file(folder, name))
    except CheckpointError as error:
        return str(error)
