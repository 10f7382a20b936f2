"""How a trained draft is used: `evaluate.decode` of params.yaml, and what it makes of a target and a draft.

Whatever decodes with a draft as it is meant to be used goes through `Deployment`: the evaluation, `deepspec chat`, a
registered version, and our side of `deepspec serve-check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.decoding.cost import CostCurve
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.pass_times import Watch
from deepspec.decoding.profiles import load_or_measure
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.drafters.algorithms.lookup import TrainingFreeDrafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.drafters.params import DecodeParams, LookupChoice
from deepspec.drafters.registry import algorithms
from deepspec.target.model import Target


@dataclass(frozen=True)
class Deployment:
    """A target with a draft, and all that says how the draft is used.

    Args:
        drafter: with the lookup before it; None decodes plainly.
        tree, verify, controller: see `Engine`.
    """

    target: Target
    drafter: Drafter | None = None
    tree: Shape = CHAIN
    verify: str | None = None
    controller: Controller | None = None

    @classmethod
    def of(
        cls,
        target: Target,
        draft: str | Path | Drafter,
        decode: DecodeParams | None = None,
        curve: CostCurve | None = None,
        watch: Watch | None = None,
    ) -> Deployment:
        """Return what `decode` makes of a target and a draft.

        Args:
            draft: its directory, or what `load_drafter` made of it.
            decode: None takes the defaults.
            curve: measured costs of the two on this device. None: where the controller decides by them, those of one
                request at a time are read from the user's cache, or measured and kept there.
            watch: see `load_or_measure`.

        Raises:
            DeepSpecError: not a draft directory, or another target's draft.
        """
        decode = decode or DecodeParams()
        drafter = draft if isinstance(draft, Drafter) else load_drafter(draft, target)
        if curve is None and decode.controller.needs_curve:
            curve = load_or_measure(target, drafter.trained, batches=(1,), shape=decode.tree, watch=watch)
        return cls(
            target,
            with_lookup(drafter, decode.lookup),
            decode.tree,
            decode.verify,
            decode.controller.make(curve),
        )

    def generate(self, prompt_ids: list[int] | list[list[int]], **options: Any) -> list[Generation]:
        """Continue one prompt or a batch of them; the options are those of `decoding.engine.generate`."""
        return generate(
            self.target,
            self.drafter,
            prompt_ids,
            tree=self.tree,
            verify=self.verify,
            controller=self.controller,
            **options,
        )

    def engine(self, **options: Any) -> Engine:
        """Return an engine that decodes so; the options are the other ones of `Engine`."""
        return Engine(
            self.target,
            self.drafter,
            tree=self.tree,
            verify=self.verify,
            controller=self.controller,
            **options,
        )


def with_lookup(drafter: Drafter, lookup: LookupChoice | None) -> Drafter:
    """Return a trained draft with the lookup asked before it; a draft that is a lookup itself stays alone."""
    if lookup is None or isinstance(drafter, TrainingFreeDrafter):
        return drafter
    return LookupFirst(algorithms()[lookup.type].make(lookup), drafter)
