"""What params.yaml is read into: sections, and choices that code makes too."""

from __future__ import annotations

from dataclasses import field, fields
from functools import wraps
from typing import Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from deepspec.errors import DeepSpecError, nearest

T = TypeVar("T")


class Section(BaseModel):
    """A pydantic model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def options(self) -> dict[str, Any]:
        """Return all values but the tag `type`."""
        return self.model_dump(exclude={"type"})


def tag(*, default: str, kw_only: Literal[True]) -> Any:
    """Return the field `type` of a choice, which positional arguments and `repr` leave out.

    Type checkers read both arguments at the call: they must be written there.
    """
    return field(default=default, kw_only=kw_only, repr=False)


@dataclass_transform(frozen_default=True, field_specifiers=(Field, field, tag))
def choice(cls: type[T]) -> type[T]:
    """Make a frozen dataclass of a class; pydantic checks its values, whether params.yaml or code gives them.

    As a part of params.yaml it is told from its alternatives by its field `type` (`tag`).

    Raises:
        DeepSpecError: by the constructor, on a wrong value; params.yaml names the key in its own way.
    """
    made = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    checked = made.__init__

    @wraps(checked)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            checked(self, *args, **values)
        except ValidationError as error:
            raise DeepSpecError(_first_problem(error, made)) from None

    made.__init__ = init  # type: ignore[method-assign]  # the check wraps what pydantic made
    return cast("type[T]", made)  # pydantic's signature forgets the class


def _first_problem(error: ValidationError, made: type) -> str:
    first = error.errors()[0]
    names = [each.name for each in fields(made) if not each.kw_only]
    given, *inside = first["loc"]
    name = names[given] if isinstance(given, int) and given < len(names) else str(given)
    if first["type"] == "unexpected_keyword_argument":
        return f"{made.__name__} has no {name!r}{nearest(name, names)}; known: {', '.join(names) or 'none'}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{made.__name__} needs {name!r}"
    place = ".".join(map(str, (name, *inside)))
    return f"{made.__name__}.{place}: {first['msg']} (found {first['input']!r})"
