"""`deepspec inspect DIR`: what a draft directory is, for which target, what it leaves unsaid, and whether it loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepspec.drafters.checkpoint import draft_directory
from deepspec.drafters.load import examine, load_drafter
from deepspec.drafters.published.plan import Plan
from deepspec.errors import DeepSpecError
from deepspec.target.weights import stored, weight_files


def run(name: str, target: str | None) -> bool:
    """
    Print what a directory is; return whether it loads.

    Args:
        name: a draft under data/drafts, or a directory.
        target: with which it is loaded to the last weight; None reads configuration and names alone.

    Raises:
        DeepSpecError: not a draft directory, or no such target.
    """
    from rich.console import Console
    from rich.table import Table

    directory = draft_directory(name)
    plan, refusal = _examined(directory, target)
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows(directory, plan):
        table.add_row(key, value)
    table.add_row("loads", f"no: {refusal}" if refusal else _loads(plan, target))
    Console(width=120, highlight=False).print(table)
    return refusal is None


def _examined(directory: Path, source: str | None) -> tuple[Plan, str | None]:
    """Return the plan, and why it does not load."""
    if source is None:
        plan = examine(directory)
        return plan, plan.refusal
    from deepspec.target.model import load_target

    target = load_target(source, device="cpu")
    plan = examine(directory, target.num_layers)
    try:
        load_drafter(directory, target)
    except DeepSpecError as error:
        return plan, str(error).removeprefix(f"{directory}: ")
    return plan, None


def _loads(plan: Plan, target: str | None) -> str:
    if target is not None:
        return f"yes, for {target}: every weight is accounted for"
    return "as far as its configuration and the names of its weights say; --target X reads them all"


def rows(directory: Path, plan: Plan) -> Iterator[tuple[str, str]]:
    """Return what is known of a directory, a line each."""
    config = plan.config
    yield "what", plan.what
    yield "style", plan.style
    yield "target", plan.made_for or "not said"
    if config.get("hidden_size"):
        layers = config.get("num_target_layers")
        deep = f", {layers} layers" if layers else ""
        yield "its target is", f"{config['hidden_size']} wide{deep}, {config.get('vocab_size')} tokens"
    if "target_layer_ids" in config:
        named = ", ".join(str(layer) for layer in config["target_layer_ids"])
        yield "reads the outputs of", f"target layers {named}"
    if config.get("block_size") or config.get("medusa_num_heads"):
        yield "drafts", f"{config.get('block_size') or config['medusa_num_heads']} tokens at most"
    columns, vocab = config.get("draft_vocab_size"), config.get("vocab_size")
    if columns and vocab and columns < vocab:
        yield "vocabulary", f"{columns} of {vocab} tokens"
    if config.get("head_rank"):
        yield "head", f"its own, of rank {config['head_rank']}"
    if scaling := config.get("rope_scaling"):
        said = ", ".join(f"{key} {value}" for key, value in scaling.items())
        yield "rotary embedding", f"base {config['rope_theta']:g}, {said}"
    if options := [key for key in _OPTIONS if config.get(key)]:
        yield "options", ", ".join(f"{key} {config[key]}" for key in options)
    yield from _weights(directory, plan)
    for said in plan.assumed:
        yield "assumed", said
    for said in plan.needs_target:
        yield "missing", said


def _weights(directory: Path, plan: Plan) -> Iterator[tuple[str, str]]:
    try:
        files, weights = weight_files(directory), stored(directory)
    except DeepSpecError:  # a lookup has none
        return
    numbers = sum(weight.size for weight in weights.values())
    yield (
        "weights",
        f"{len(weights)} ({numbers / 1e6:.4g} M numbers) in {', '.join(path.name for path in files)}",
    )
    names = set(plan.names.values()) if plan.names else set(weights)
    if plan.kind in ("eagle3", "peagle", "dspark", "dflash2"):
        head = "low_rank_head.up.weight" if plan.config.get("head_rank") else "lm_head.weight"
        lacking = [name for name in ("embed_tokens.weight", head) if name not in names]
        if lacking:
            yield "from the target", ", ".join(lacking)
    if plan.left_out:
        yield "not read", ", ".join(plan.left_out[:4]) + (" …" if len(plan.left_out) > 4 else "")


_OPTIONS = (
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "sliding_window",
    "windows",
    "causal",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
)
