"""What every node of the pack has in common: its widgets are looked at when it runs.

Hosts do not check values that come over a link, and some of them no choices of V3 nodes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..motion_modules.errors import check_choice

NUMBERS = (io.Int.io_type, io.Float.io_type)


class Node(io.ComfyNode):
    """A node whose `execute` raises ValueError, naming the widget, for a number out of range or an unknown choice."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        own = cls.__dict__.get("execute")
        if own is not None and not hasattr(own.__func__, "__wrapped__"):  # hosts make classes anew of what is in them
            cls.execute = classmethod(_checking(own.__func__))


def check_widget(item: io.Input, value: Any, name: str) -> None:
    """Raise ValueError where a number is out of its widget's range, or a choice is not one of it. name: to say."""
    if item.get_io_type() == io.Combo.io_type:
        check_choice(name, value, item.options)
    if item.get_io_type() not in NUMBERS or not isinstance(value, (int, float)):
        return
    least, most = (getattr(item, end, None) for end in ("min", "max"))
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{name} is {value}, and must lie between {least} and {most}.")


def _checking(execute: Callable) -> Callable:
    @functools.wraps(execute)
    def checked(cls: type[Node], *args: Any, **inputs: Any) -> Any:
        # files have sentences of their own, by which a node may also find them elsewhere
        own = inspect.signature(cls.validate_inputs).parameters
        for item in cls.define_schema().inputs:  # GET_SCHEMA writes to the class, which is locked while it runs
            if item.id in inputs and not (item.id in own and item.get_io_type() == io.Combo.io_type):
                check_widget(item, inputs[item.id], item.id)
        return execute(cls, *args, **inputs)

    return checked
