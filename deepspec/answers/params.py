"""The section `generate` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepspec.section import Section


class OpenAIParams(Section):
    """Any server that speaks the OpenAI chat API. The key is read from `$DEEPSPEC_OPENAI_KEY`."""

    base_urls: list[str] = Field([], description="Each is sent `concurrency` requests at once.")
    model: str = ""
    concurrency: int = Field(32, ge=1, description="Requests in flight per base URL.")
    retries: int = Field(5, ge=0)
    timeout_s: float = Field(120.0, gt=0)


class GivenParams(Section):
    """Answers that are in the data already."""

    answered_by: Literal["target", "another"] = Field(
        "target",
        description="Whose words they are; the validation checks `target`, and says so of `another`.",
    )


class GenerateParams(Section):
    """How the target answers the prompts: the distillation data."""

    engine: Literal["local", "openai", "given"] = Field(
        "local", description="`given` takes the assistant's turns from the prompts' source."
    )
    batch_size: int = Field(48, ge=1, description="Conversations decoded at once (local engine).")
    max_new_tokens: int = Field(192, ge=1, description="Per answer.")
    max_length: int = Field(512, ge=16, description="Of a whole conversation, in tokens.")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    openai: OpenAIParams = OpenAIParams()
    given: GivenParams = GivenParams()
