"""The section `study` of params.yaml, which only this folder's has."""

from __future__ import annotations

from typing import Any

from deepspec.config import Params
from deepspec.errors import DeepSpecError


def study_of(params: Params) -> Any:
    if params.study is None:
        raise DeepSpecError("params.yaml has no section `study`; paper/params.yaml has one: run it there")
    return params.study
