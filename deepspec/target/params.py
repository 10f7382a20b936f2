"""The section `target` of params.yaml."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from deepspec.section import Section


class TargetParams(Section):
    """The verifier."""

    source: str = Field(description="`embedded:<name>`, a local directory, or a hub id.")
    revision: str | None = Field(None, description="Pinned hub revision; ignored for a directory.")
    template_date: str | None = Field(
        None,
        description="Day like 2026-11-29 that a chat template is given which asks for the date; null: the day on which "
        "the target is first resolved.",
    )
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Of the target's template, wherever it is rendered: `{enable_thinking: false}`."
    )
