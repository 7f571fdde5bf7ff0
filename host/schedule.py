"""Noise schedules of the published motion modules, as the host's sampling objects.

The host's and LDM's name for a schedule is not diffusers' name: "linear" here is linear in the square root of beta.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ..motion_modules.animatediff.spec import Schedule
from ..motion_modules.errors import ModelMismatchError
from ..sampling.inversion import Prediction

HOST_SETTINGS = {
    Schedule.SCALED_LINEAR: {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012},
    Schedule.LINEAR: {"beta_schedule": "sqrt_linear", "linear_start": 0.00085, "linear_end": 0.012},
    Schedule.SCALED_LINEAR_SDXL: {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.020},
}


def set_schedule(model: ModelPatcher, schedule: Schedule) -> None:
    """Give a (cloned) MODEL this noise schedule, keeping what its network predicts and whether its last step is pure
    noise (zero terminal SNR).

    Raises ModelMismatchError for a model that has no discrete noise schedule.
    """
    current = model.get_model_object("model_sampling")
    if not isinstance(current, comfy.model_sampling.ModelSamplingDiscrete):
        raise ModelMismatchError(f"The noise schedule '{schedule.value}' needs a model with discrete time steps, and "
                                 f"this one uses {type(current).__mro__[1].__name__}. Choose 'image model's own'.")
    model.add_object_patch("model_sampling", _of_the_same_kind(current, schedule))


def _of_the_same_kind(current: Any, schedule: Schedule) -> Any:
    settings = SimpleNamespace(sampling_settings=HOST_SETTINGS[schedule] | {"zsnr": current.zsnr})
    return type(current)(settings)


def is_schedule(model_sampling: Any, schedule: Schedule) -> bool:
    """Whether the host's sampling object has the noise levels of this schedule."""
    if not isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete):
        return False
    wanted, found = _of_the_same_kind(model_sampling, schedule).sigmas, model_sampling.sigmas
    return wanted.shape == found.shape and torch.allclose(wanted, found.to(wanted), rtol=1e-3)


def prediction_of(model: ModelPatcher) -> Prediction:
    """What the network of a MODEL predicts. Raises ModelMismatchError where it is neither noise nor velocity."""
    kind = type(model.get_model_object("model_sampling"))
    for known, prediction in ((comfy.model_sampling.EPS, Prediction.NOISE),
                              (comfy.model_sampling.V_PREDICTION, Prediction.VELOCITY)):  # fmt: skip
        same = all(getattr(kind, name) is getattr(known, name)
                   for name in ("calculate_denoised", "calculate_input", "noise_scaling"))  # fmt: skip
        if same and getattr(model.get_model_object("model_sampling"), "sigma_data", 1.0) == 1.0:
            return prediction
    name = next(part.__name__ for part in kind.__mro__ if "calculate_denoised" in vars(part))
    raise ModelMismatchError(f"This MODEL is sampled as {name}, and DDIM inversion is right only for models that "
                             "predict noise or v, as SD1.x, SD2.x and SDXL do. Connect one of those; if a node or a "
                             "distilled module such as LCM changes its sampling, invert without it.")  # fmt: skip


def noise_scale(model_sampling: Any, sigmas: torch.Tensor) -> float:
    """By how much the host multiplies noise of unit variance when a run begins at sigmas[0]."""
    guider = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=model_sampling))
    most = comfy.samplers.Sampler().max_denoise(guider, sigmas)
    return float(model_sampling.noise_scaling(sigmas[:1], sigmas.new_ones(1), sigmas.new_zeros(1), most))
