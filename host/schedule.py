"""Noise schedules of the published motion modules, as the host's sampling objects.

The host's and LDM's name for a schedule is not diffusers' name: "linear" here is linear in the square root of beta.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher

from ..motion_modules.animatediff.spec import Schedule
from ..motion_modules.errors import ModelMismatchError

HOST_SETTINGS = {
    Schedule.SCALED_LINEAR: {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012},
    Schedule.LINEAR: {"beta_schedule": "sqrt_linear", "linear_start": 0.00085, "linear_end": 0.012},
    Schedule.SCALED_LINEAR_SDXL: {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.020},
}


def set_schedule(model: ModelPatcher, schedule: Schedule) -> None:
    """Give a (cloned) MODEL this noise schedule, keeping what its network predicts.

    Raises ModelMismatchError for a model that has no discrete noise schedule.
    """
    current = model.get_model_object("model_sampling")
    if not isinstance(current, comfy.model_sampling.ModelSamplingDiscrete):
        raise ModelMismatchError(f"The noise schedule '{schedule.value}' needs a model with discrete time steps, and "
                                 f"this one uses {type(current).__mro__[1].__name__}. Choose 'image model's own'.")
    settings = SimpleNamespace(sampling_settings=HOST_SETTINGS[schedule])
    model.add_object_patch("model_sampling", type(current)(settings))
