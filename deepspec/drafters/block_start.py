"""What a block drafter that begins as another (`start: <directory>`) takes from its section."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from deepspec.drafters.block_network import BlockConfig, seen
from deepspec.drafters.origin import Origin, check_kept
from deepspec.drafters.params import BlockParams


def backbone_as_asked(
    params: BlockParams, asked: Collection[str], origin: Origin, config: BlockConfig
) -> dict[str, Any]:
    """Return what of the backbone's `config` changes, where its section asks for it.

    Args:
        asked: keys of the section that were written.

    Raises:
        DeepSpecError: it asks for other layers, which the draft cannot change.
    """
    if "layers" in asked:
        check_kept({"num_hidden_layers": params.layers}, origin)
    if "target_layer_ids" in asked and params.target_layer_ids:
        check_kept({"target_layer_ids": params.target_layer_ids}, origin)
    changed = {
        name: getattr(params, name)
        for name in ("block_size", "sample_from_anchor", "context_skip")
        if name in asked
    }
    wanted = seen(params, config.num_hidden_layers)
    for key, name in (("sliding_window", "windows"), ("causal", "causal")):
        if key in asked:
            changed[name] = wanted[name]
    if "head_rank" in asked:
        if config.head_rank:
            check_kept({"head_rank": params.head_rank}, origin)
        changed["head_rank"] = params.head_rank
    if "draft_vocab_size" in asked:
        changed["draft_vocab_size"] = min(params.draft_vocab_size or config.vocab_size, config.vocab_size)
    return changed
