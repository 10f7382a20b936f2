"""The choices of a tree shape and of a controller in params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deepspec.section import Section


class ChainTree(Section):
    """One path."""

    type: Literal["chain"]
    depth: int | None = Field(None, ge=1, description="None: the drafter's block size.")


class StaticTree(Section):
    type: Literal["static"]
    paths: list[list[int]] = Field(description="Paths of child ranks: [1, 0] is the second child's first.")


class BeamTree(Section):
    """EAGLE-2: the `width` best nodes of a level are expanded, the `nodes` best of all are kept."""

    type: Literal["beam"]
    width: int = Field(8, ge=1)
    depth: int | None = Field(None, ge=1)
    nodes: int = Field(24, ge=1)


class BestFirstTree(Section):
    """The `nodes` likeliest paths, at most `width` children a node."""

    type: Literal["best_first"]
    width: int = Field(8, ge=1)
    depth: int | None = Field(None, ge=1)
    nodes: int = Field(24, ge=1)


class SampledTree(Section):
    type: Literal["sampled"]
    branching: list[int] = Field([8, 4, 2, 1], description="Most children a node, by depth.")
    budget: int | None = Field(24, ge=1, description="Nodes kept, those likeliest to survive; None: all.")


TreeParams = Annotated[
    ChainTree | StaticTree | BeamTree | BestFirstTree | SampledTree, Field(discriminator="type")
]


class FixedController(Section):
    type: Literal["fixed"]
    length: int | None = Field(None, ge=1, description="Levels verified; None: all.")


class ThresholdController(Section):
    type: Literal["threshold"]
    least: float = Field(ge=0, le=1, description="Confidence below which a path is cut.")


class CostController(Section):
    """Verifies what pays on the measured cost curve, one request at a time; pauses where drafting does not."""

    type: Literal["cost"]


class SchedulerController(Section):
    """DSpark's prefix scheduler: one verification budget for all requests in flight."""

    type: Literal["scheduler"]


ControllerParams = Annotated[
    FixedController | ThresholdController | CostController | SchedulerController, Field(discriminator="type")
]
