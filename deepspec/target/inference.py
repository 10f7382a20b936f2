"""Inference mode, entered once: the parts of a round are called in it, and to enter it takes some microseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function in `torch.inference_mode`, which is entered where it is not on."""
    entered = torch.inference_mode()(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if torch.is_inference_mode_enabled() else entered)(*args, **kwargs)

    return run
