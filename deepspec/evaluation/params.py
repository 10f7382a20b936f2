"""The section `evaluate` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from deepspec.decoding.params import AnyController, FixedController
from deepspec.drafters.params import DecodeParams
from deepspec.section import Section


class SweepParams(Section):
    """The trained draft alone over chain lengths, tree depths and node budgets, at T = 0."""

    prompts: int = Field(1, ge=1, description="Per task.")
    max_new_tokens: int = Field(48, ge=1)
    depth_nodes: int = Field(16, ge=1, description="Nodes of the trees whose depth is swept.")
    nodes: list[Annotated[int, Field(ge=1)]] = Field([4, 8, 16, 32], min_length=1)


class ThroughputParams(Section):
    """Tokens a second with several requests in flight: plain, fixed lengths, the prefix scheduler."""

    batches: list[Annotated[int, Field(ge=1)]] = Field([1, 4, 16], min_length=1)
    lengths: list[Annotated[int, Field(ge=1)]] = Field(
        [2], description="Fixed ones; the whole block is added."
    )
    temperatures: list[Annotated[float, Field(ge=0)]] = Field([0.0], min_length=1)
    groups: int = Field(2, ge=1, description="Of prompts, decoded by all one after the other.")
    max_new_tokens: int = Field(24, ge=1)


class EvaluateParams(Section):
    tasks: list[str] = Field(
        min_length=1, description="Names of `deepspec/tasks/*.yaml` or paths to such files."
    )
    tasks_dir: str | None = Field(
        None, description="Its `<task>.jsonl` is read instead; `$DEEPSPEC_TASKS_DIR` takes its place."
    )
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.0, 1.0], min_length=1, description="0 is greedy."
    )
    prompts_per_task: int = Field(8, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    plain_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Of a plain run, whose rate changes little along an answer, where no later turn follows the "
        "answer; null: `max_new_tokens`.",
    )
    computed: bool = Field(
        False,
        description="The lookup alone and the sweeps are not decoded: their rounds are counted along answers that "
        "were, and their passes priced by the cost curve.",
    )
    lossless_prompts: int = Field(4, ge=1, description="Per task, checked in float32 at T = 0.")
    lossless_new_tokens: int = Field(64, ge=1)
    decode: DecodeParams = DecodeParams()
    controllers: list[AnyController] = Field(
        [FixedController()],
        description="Others, measured beside that of `decode` on the same prompts.",
    )
    traces: int = Field(
        1, ge=0, description="Prompts per task and temperature that the report shows token by token."
    )
    sweeps: SweepParams | None = Field(SweepParams(), description="null: not measured.")
    throughput: ThroughputParams | None = Field(ThroughputParams(), description="null: not measured.")

    def full(self) -> EvaluateParams:
        """Return the same with everything measured: nothing computed, no plain run cut, no section left out."""
        every = EvaluateParams(tasks=self.tasks)
        return self.model_copy(
            update={
                "plain_new_tokens": None,
                "computed": False,
                "controllers": self.controllers or every.controllers,
                "sweeps": self.sweeps or every.sweeps,
                "throughput": self.throughput or every.throughput,
            }
        )
