"""The section `target` of params.yaml."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from deepspec.section import Section


class VLLMParams(Section):
    """The servers of `engine: vllm`: started by the stage that needs them, or running ones."""

    base_urls: list[str] = Field(
        [],
        description="Running servers of this target, which share the requests; none: the stage starts one.",
    )
    states_folder: str | None = Field(
        None,
        description="Where servers at `base_urls` write hidden states, as this machine sees that folder.",
    )
    concurrency: int = Field(64, ge=1, description="Requests in flight at each server.")
    retries: int = Field(5, ge=0)
    timeout_s: float = Field(600.0, gt=0, description="Longest wait for a reply.")
    tensor_parallel: int = Field(1, ge=1)
    pipeline_parallel: int = Field(1, ge=1)
    expert_parallel: bool = False
    quantization: str | None = Field(
        None, description="As vLLM's --quantization; it makes another target of the same files."
    )
    arguments: list[str] = Field(
        [], description="More of vLLM's own, e.g. [--max-num-batched-tokens, '8192']."
    )

    @model_validator(mode="after")
    def _one_place(self) -> VLLMParams:
        own = {"tensor_parallel": 1, "pipeline_parallel": 1, "expert_parallel": False, "arguments": []}
        given = [name for name, default in own.items() if getattr(self, name) != default]
        if self.base_urls and given:
            raise ValueError(
                f"target.vllm.{given[0]} is of a server that is started here, and base_urls names others"
            )
        if self.states_folder is not None and not self.base_urls:
            raise ValueError("target.vllm.states_folder is of servers at base_urls, and none are named")
        return self


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
    engine: Literal["local", "vllm"] = Field(
        "local",
        description="What runs it: this project's engine, or vLLM for targets that only vLLM can hold.",
    )
    vllm: VLLMParams = VLLMParams()
