"""The choice of a controller in params.yaml, which is read without torch: a controller is imported where it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deepspec.errors import DeepSpecError, nearest
from deepspec.section import choice, tag

if TYPE_CHECKING:
    from deepspec.decoding.cost import CostCurve
    from deepspec.decoding.scheduler import Controller


_CORRECTED: Any = Field(
    default=False,
    description="Correct the curve by what rounds take; a plain round in 64 shows what one takes. Greedy text stays "
    "the same, and the law of sampled text, but not the tokens that a seed draws.",
)


class ControllerChoice:
    """A controller by its name and options; `make` gives a fresh one."""

    type: str
    needs_curve = False

    def make(self, curve: CostCurve | None = None) -> Controller:
        """Return a controller that has seen nothing yet.

        Args:
            curve: measured costs of this target and drafter on this device.

        Raises:
            DeepSpecError: no curve where the controller decides by one (`needs_curve`).
        """
        return self._make(curve)

    def _measured(self, curve: CostCurve | None) -> CostCurve:
        if curve is None:
            raise DeepSpecError(
                f"the {self.type} controller needs a measured cost curve; run `deepspec profile`"
            )
        return curve

    def _make(self, curve: CostCurve | None) -> Controller:
        raise NotImplementedError


@choice
class FixedController(ControllerChoice):
    type: Literal["fixed"] = tag(default="fixed", kw_only=True)
    length: int | None = Field(default=None, ge=1, description="Levels verified; None: all.")

    def _make(self, curve: CostCurve | None) -> Controller:
        from deepspec.decoding.scheduler import Fixed

        return Fixed(self.length)


@choice
class ThresholdController(ControllerChoice):
    type: Literal["threshold"] = tag(default="threshold", kw_only=True)
    least: float = Field(ge=0, le=1, description="Confidence below which a path is cut.")

    def _make(self, curve: CostCurve | None) -> Controller:
        from deepspec.decoding.scheduler import Threshold

        return Threshold(self.least)


@choice
class CostController(ControllerChoice):
    """Verifies what pays on the measured cost curve, one request at a time; pauses where drafting does not."""

    type: Literal["cost"] = tag(default="cost", kw_only=True)
    corrected: bool = _CORRECTED
    needs_curve = True

    def _make(self, curve: CostCurve | None) -> Controller:
        from deepspec.decoding.scheduler import CostStop

        return CostStop(self._measured(curve), self.corrected)


@choice
class SchedulerController(ControllerChoice):
    """DSpark's prefix scheduler: one verification budget for all requests in flight."""

    type: Literal["scheduler"] = tag(default="scheduler", kw_only=True)
    corrected: bool = _CORRECTED
    needs_curve = True

    def _make(self, curve: CostCurve | None) -> Controller:
        from deepspec.decoding.scheduler import PrefixScheduler

        return PrefixScheduler(self._measured(curve), self.corrected)


AnyController = Annotated[
    FixedController | ThresholdController | CostController | SchedulerController, Field(discriminator="type")
]
CONTROLLERS = {
    "fixed": FixedController,
    "threshold": ThresholdController,
    "cost": CostController,
    "scheduler": SchedulerController,
}


def make_controller(name: str, curve: CostCurve | None = None, **options: Any) -> Controller:
    """Return a controller by its name: "fixed" (length), "threshold" (least), "cost" or "scheduler" (by the curve).

    Raises:
        DeepSpecError: unknown name or option, a missing option, or no curve where one is needed.
    """
    if name not in CONTROLLERS:
        raise DeepSpecError(
            f"unknown controller {name!r}; known: {', '.join(CONTROLLERS)}{nearest(name, CONTROLLERS)}"
        )
    return CONTROLLERS[name](**options).make(curve)
