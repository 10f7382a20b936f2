"""What a drafting algorithm brings to the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, get_args

from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import Checkpoint
from deepspec.drafters.network import Network
from deepspec.errors import DeepSpecError
from deepspec.section import Section
from deepspec.target.ends import Ends
from deepspec.target.model import Target

if TYPE_CHECKING:
    from deepspec.drafters.algorithms.lookup import TrainingFreeDrafter


class DrafterSection(Protocol):
    """What every section under `drafters` of params.yaml has, whichever algorithm's it is."""

    @property
    def type(self) -> str:
        """Return the algorithm's name."""


def _no_file(checkpoint: Checkpoint, target: Target) -> Drafter:
    raise DeepSpecError(f"{checkpoint.directory}: drafts of this algorithm are written as another's")


def _no_section(params: DrafterSection) -> TrainingFreeDrafter:
    raise DeepSpecError(f"a {params.type} draft is trained: its section alone does not make one")


@dataclass(frozen=True)
class Algorithm:
    """What a drafting algorithm brings.

    Args:
        params: its section under `drafters` in params.yaml; the literal of its `type` is the algorithm's name.
        architectures: of the `config.json` that `load` reads, as patterns; an algorithm may write another's.
        load: (directory, target) → the drafter.
        network: (params, target) → the network to train; None for an algorithm that is not trained.
        read: (directory, target) → the network that was trained, in float32; None likewise.
        standalone: its drafts are models whose sizes say nothing of the target's.
        make: params → the drafter of an algorithm that is not trained; its `config` is its config.json.
    """

    params: type[Section]
    architectures: tuple[str, ...]
    load: Callable[[Checkpoint, Target], Drafter] = _no_file
    network: Callable[[Any, Ends], Network] | None = None
    make: Callable[[Any], TrainingFreeDrafter] = _no_section
    standalone: bool = False
    read: Callable[[Checkpoint, Ends], Network] | None = None

    @property
    def type(self) -> str:
        return get_args(self.params.model_fields["type"].annotation)[0]
