"""Untrained drafts of a tiny target, written as training writes them, and their exports."""

from __future__ import annotations

from pathlib import Path

from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.registry import algorithms
from deepspec.export.draft import Draft, load_draft
from deepspec.export.engines import plan
from deepspec.export.layout import Layout, write
from deepspec.export.sample import samples
from deepspec.target.model import Target
from tests.tiny import make_network

LAYERS = 8  # of the target: room for layer ids that are off by one
SIZES = {
    "eagle3": {"block_size": 3, "draft_vocab_size": 64, "target_layer_ids": [1, 3, 5]},
    "peagle": {"block_size": 3, "layers": 2, "draft_vocab_size": 64, "target_layer_ids": [1, 3, 5]},
    "dspark": {
        "layers": 2,
        "block_size": 3,
        "draft_vocab_size": 64,
        "markov_rank": 64,  # a square Markov matrix: transposed it has the same shape
        "target_layer_ids": [1, 2, 4, 5],
    },
    "dflash": {"layers": 2, "block_size": 3, "draft_vocab_size": 64, "target_layer_ids": [1, 3, 5]},
    "dflash2": {
        "layers": 2,
        "block_size": 3,
        "draft_vocab_size": 0,
        "target_layer_ids": [1, 3, 5],
        "selector_rank": 8,
        "selector_top_k": 6,
    },
    "mtp": {"block_size": 3, "start": "random"},
    "medusa": {"heads": 3, "layers": 2, "draft_vocab_size": 64},
    "lm": {"block_size": 3, "from_layers": [0, 3]},
    "lookup": {"block_size": 4, "min_match": 2},
    "suffix": {"block_size": 4, "min_match": 3},
}


def make_draft(root: Path, target: Target, type: str, **sizes) -> Draft:
    """An untrained draft in `root / type`."""
    sizes = SIZES[type] | sizes
    directory = root / type
    algorithm = algorithms()[type]
    if algorithm.network is None:
        made = algorithm.make(algorithm.params(type=type, **sizes))
        write_drafter(directory, made.config, {}, target, {"data_digest": None})
    else:
        model = make_network(target, type, **sizes)
        write_drafter(directory, model.description(), stored_weights(model), target, {"data_digest": "d1"})
    return load_draft(type, directory, target)


def written(draft: Draft, engine: str, root: Path) -> tuple[Layout, Path]:
    """The draft's directory for an engine, without a card."""
    path = root / engine
    layout = plan(draft, engine, str(path), draft.block_size)
    write(layout, path, "")
    return layout, path


__all__ = ["LAYERS", "SIZES", "make_draft", "samples", "written"]
