"""Typed `params.yaml`; the only reader of it.

Every section is a pydantic model that refuses unknown keys and lives in the package of the stage that it configures
(`deepspec/<stage>/params.py`). An error names the key by its dotted path and the nearest valid one, so that a typo is
found before anything runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args, overload

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from deepspec.answers.params import GenerateParams
from deepspec.decoding.params import AnyController
from deepspec.decoding.shapes import AnyShape
from deepspec.drafters.params import AnyDrafter
from deepspec.drafters.position_weights import AnyWeights
from deepspec.errors import DeepSpecError, nearest
from deepspec.evaluation.params import EvaluateParams
from deepspec.guard.params import ValidateParams
from deepspec.prompts.params import PromptsParams
from deepspec.section import Section
from deepspec.target.params import TargetParams
from deepspec.tracking.params import PromoteParams
from deepspec.training.params import TrainParams


def _fields(section: type) -> dict[str, FieldInfo]:
    """Return the fields of a `Section` or a `choice`."""
    return vars(section)["__pydantic_fields__"]


TAGGED: dict[str, type] = {
    get_args(_fields(section)["type"].annotation)[0]: section
    for union in (AnyDrafter, AnyShape, AnyController, AnyWeights)
    for section in get_args(get_args(union)[0])
}


class Params(Section):
    seed: int = 0
    target: TargetParams
    prompts: PromptsParams
    generate: GenerateParams = GenerateParams()
    validate_: ValidateParams = Field(ValidateParams(), alias="validate")
    pipeline: list[str] = Field(description="Drafters that the pipeline trains and evaluates.")
    drafters: dict[str, AnyDrafter] = Field(description="Drafter name → its algorithm and sizes.")
    train: TrainParams
    evaluate: EvaluateParams
    promote: PromoteParams = PromoteParams()
    study: Any = Field(None, description="Of a pipeline of its own, which checks it: paper/params.py.")

    @model_validator(mode="after")
    def _named(self) -> Params:
        for name in self.pipeline:
            if name not in self.drafters:
                raise ValueError(
                    f"pipeline names {name!r}, which `drafters` lacks{nearest(name, self.drafters)}"
                )
        return self

    @model_validator(mode="after")
    def _held(self) -> Params:
        if self.target.engine == "vllm" and self.train.real_decode:
            raise ValueError(
                "train.real_decode decodes with the whole target in the trainer, and target.engine is vllm; set "
                "train.real_decode to false"
            )
        return self


P = TypeVar("P", bound=Params)


@overload
def load_params(path: str | Path = ...) -> Params: ...


@overload
def load_params(path: str | Path, model: type[P]) -> P: ...


def load_params(path: str | Path = "params.yaml", model: type[Params] = Params) -> Params:
    """Read and check a params file.

    Args:
        model: what the file must be; a pipeline of its own may have more sections (paper/params.py).

    Raises:
        DeepSpecError: the file is missing, is not YAML, or has an unknown or mistyped key.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DeepSpecError(
            f"{path}: no such file; run from the repository's root or pass --params"
        ) from None
    except yaml.YAMLError as error:
        raise DeepSpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise DeepSpecError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise DeepSpecError(f"{path}: {_explain(error, raw, model)}") from None


def _explain(error: ValidationError, raw: dict, root: type) -> str:
    """Return the first problem of a validation error, in one line with the dotted key."""
    # A key that was renamed is both unknown and missing: the former says how it was meant.
    kinds = ("extra_forbidden", "unexpected_keyword_argument")
    first = min(error.errors(), key=lambda found: found["type"] not in kinds)
    key, model = _locate(first["loc"], raw, root)
    if first["type"] in kinds:
        word = str(first["loc"][-1])
        return f"unknown key {key!r}{nearest(word, _names(model))}"
    if first["type"] == "missing":
        return f"missing key {key!r}"
    if first["type"] == "union_tag_invalid":
        found = first["ctx"]["tag"]
        known = [tag.strip("' ") for tag in first["ctx"]["expected_tags"].split(",")]
        return f"{key}.type: unknown type {found!r}{nearest(found, known)}; known: {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message} (found {first['input']!r})" if key and first["type"] != "value_error" else message
    )


def _locate(loc: tuple, raw: dict, root: type) -> tuple[str, type | None]:
    """Return the dotted key as written in the file, and the model of the section in which it stands.

    Pydantic puts the tag of a discriminated union into the location; the file has no such level.
    """
    model: type | None = root
    node: Any = raw
    parts: list[str] = []
    for i, step in enumerate(loc):
        last = i == len(loc) - 1
        if model is None and isinstance(node, dict) and node.get("type") == step and step not in node:
            model = TAGGED[step]
            continue
        parts.append(str(step))
        node = node.get(step) if isinstance(node, dict) else None
        if not last:
            model = _child(model, step)
    return ".".join(parts), model


def _child(model: type | None, name: Any) -> type | None:
    if model is None:
        return None
    for key, found in _fields(model).items():
        if name == (found.alias or key) and isinstance(found.annotation, type):
            return found.annotation if issubclass(found.annotation, Section) else None
    return None


def _names(model: type | None) -> list[str]:
    return [found.alias or key for key, found in _fields(model).items()] if model else []
