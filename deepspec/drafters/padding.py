"""A vocabulary that draft and target pad to different sizes: the draft's is cut or extended to the target's.

Rows beyond the tokens of the tokenizer are padding. What a draft has of them beyond the target's goes; where the target
has more, the draft has no columns for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.drafters.published.vocabulary import draft_ids
from deepspec.errors import DeepSpecError
from deepspec.target.ends import Ends
from deepspec.target.weights import read_weights

# A row for each token of the draft vocabulary, and a row for each of the target's.
BY_COLUMN = (
    "lm_head.weight",
    "low_rank_head.up.weight",
    "markov_head.markov_w2.weight",
    "candidate_selector.successor_codebook",
)
_BY_TOKEN = (
    "embed_tokens.weight",
    "markov_head.markov_w1.weight",
    "candidate_selector.predecessor_codebook",
    "t2d",
)
_OWN_HEAD = re.compile(r"\d+\.\d+\.weight")  # Medusa's, of a column each


@dataclass(frozen=True)
class Padding:
    """How the weights of a draft are made to fit.

    Args:
        found: rows of its vocabulary.
        wanted: rows of the target's.
        whole: whether it has a column for each of its rows.
        columns: of a reduced vocabulary, those whose tokens the target has, and what tokens these are.
    """

    found: int
    wanted: int
    whole: bool
    columns: dict[int, int] | None = None

    def fit(self, weights: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
        """Return a draft's weights, by our names, with a vocabulary of the target's size.

        Raises:
            DeepSpecError: a weight that has not as many rows as the configuration says.
        """
        kept = {name: self._fitted(name, weight, directory) for name, weight in weights.items()}
        ids = None if self.columns is None else torch.tensor(list(self.columns.values()))
        if self.whole and self.found < self.wanted and "d2t" not in kept:
            ids = torch.arange(self.found)
        if ids is not None:
            kept["d2t"] = ids - torch.arange(len(ids))
            kept["t2d"] = torch.zeros(self.wanted, dtype=torch.bool).index_fill(0, ids, True)
        return kept

    def _fitted(self, name: str, weight: Tensor, directory: Path) -> Tensor:
        by_column = name in BY_COLUMN or name == "d2t" or _OWN_HEAD.fullmatch(name) is not None
        if by_column and self.columns is not None:
            return weight[list(self.columns)]
        if name not in _BY_TOKEN and not (self.whole and by_column):
            return weight
        if len(weight) != self.found:
            raise DeepSpecError(f"{directory}: vocab_size is {self.found}, but {name} has {len(weight)} rows")
        weight = weight[: self.wanted]
        if by_column:
            return weight
        return F.pad(weight, (0, 0) * (weight.dim() - 1) + (0, self.wanted - len(weight)))


def fitted(
    directory: Path, config: dict[str, Any], names: Mapping[str, str] | None, target: Ends
) -> tuple[dict[str, Any], Padding | None]:
    """Return a draft's configuration with a vocabulary of the target's size, and how its weights are made to fit.

    Args:
        config: in our keys.
        names: of the weights; see `Checkpoint`.

    Raises:
        DeepSpecError: fewer rows than the target has tokens, or a mask token that the target has no row for.
    """
    found, wanted = config.get("vocab_size"), target.vocab_size
    if found is None or found == wanted:
        return config, None
    tokens = min(max(target.tokenizer.get_vocab().values()) + 1, wanted)
    if found < tokens:
        raise DeepSpecError(
            f"{directory}: vocab_size is {found}, but the target {target.source} has {wanted}, {tokens} of them tokens"
        )
    if (mask := config.get("mask_token_id")) is not None and mask >= wanted:
        raise DeepSpecError(
            f"{directory}: its mask is token {mask} of {found}, and the target {target.source} has {wanted}"
        )
    size = config.get("draft_vocab_size") or found
    whole, columns = size == found, None
    if not whole and found > wanted:
        columns = _columns(read_weights(directory, names), size, found, wanted)
    kept = min(found, wanted) if whole else size if columns is None else len(columns)
    return config | {"vocab_size": wanted, "draft_vocab_size": kept}, Padding(found, wanted, whole, columns)


def _columns(weights: Mapping[str, Tensor], size: int, found: int, wanted: int) -> dict[int, int] | None:
    """Return columns → tokens of a reduced vocabulary without the padding that the target has not; None: all stay."""
    if "d2t" not in weights:
        return None
    ids = draft_ids(weights["d2t"], weights.get("t2d"), size, found).tolist()
    return (
        {column: token for column, token in enumerate(ids) if token < wanted} if max(ids) >= wanted else None
    )
