"""What a draft directory is: each style's module is asked in turn."""

from __future__ import annotations

from pathlib import Path

from deepspec.drafters.checkpoint import Checkpoint, check_target, read_config
from deepspec.drafters.padding import fitted
from deepspec.drafters.published import block, deepseek, eagle3, medusa, models, ours, speculators
from deepspec.drafters.published.plan import Found, Plan, Recognise
from deepspec.errors import DeepSpecError
from deepspec.target.ends import Ends
from deepspec.target.weights import stored

STYLES: tuple[Recognise, ...] = (
    speculators.recognise,
    ours.recognise,
    medusa.recognise,
    deepseek.recognise,
    block.recognise,
    eagle3.recognise,
    models.recognise,
)


def recognise(directory: Path, target_layers: int | None = None) -> Plan:
    """
    Return what a directory is and how it is loaded; of its weights only names and sizes are read.

    Args:
        target_layers: of the target that it is to draft for, where it is known.

    Raises:
        DeepSpecError: not a draft directory, or weights that cannot be read.
    """
    config = read_config(directory)
    found = Found(config, stored(directory), target_layers)
    for style in STYLES:
        if (plan := style(found)) is not None:
            return plan
    return Plan("unknown", "unknown", refusal=f"unknown draft architecture {config.get('architectures')}")


def opened(directory: Path, plan: Plan, target: Ends, standalone: bool = False) -> Checkpoint:
    """
    Return a directory as the algorithm of its plan reads it.

    Args:
        standalone: whether it is a model whose sizes say nothing of the target's.

    Raises:
        DeepSpecError: it is not run here, or it is another target's draft.
    """
    if plan.refusal is not None:
        raise DeepSpecError(f"{directory}: {plan.refusal}")
    config = dict(plan.config)
    check_target(directory, config, target, standalone)
    padding = None
    if not standalone:
        config, padding = fitted(directory, config, plan.names, target)
    if plan.kind == "medusa":
        config = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size} | config
    elif config.get("target_layer_ids"):
        try:
            target.check_layers(config["target_layer_ids"])
        except DeepSpecError as error:
            raise DeepSpecError(f"{directory}: {error}") from None
    return Checkpoint(directory, config, plan.names, padding)
