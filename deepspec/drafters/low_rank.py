"""A head of low rank over the whole vocabulary, in the place of one over a part of it (SlimSpec, arXiv 2605.10453).

The logits of a state h are B (A h) with A [r, d] and B [vocab, r], so that every token can be drafted at r/d of what
the target's head costs. Both are trained with the rest: as the best of their rank they know the target's law worse
than the target's own rows of frequent tokens do, and nothing before them could make up for it. B with its gradient
and the optimiser's moments takes 4r/d of the memory of the frozen head, which the target's law still needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspec.errors import DeepSpecError

_ROWS = 16384  # of the head that are multiplied at once
_LEAST_COUNT, _LEAST_SPREAD = 1e-2, 1e-6  # shares of the mean


class LowRankHead(nn.Module):
    """B (A h).

    Raises:
        DeepSpecError: by the constructor, a reduced vocabulary, or a rank above the width of the states.
    """

    def __init__(self, config: Any):
        super().__init__()
        rank, d, columns = config.head_rank, config.hidden_size, config.draft_vocab_size
        if columns < config.vocab_size:
            raise DeepSpecError(
                f"head_rank {rank} is of a head over the whole vocabulary, and draft_vocab_size keeps {columns} of "
                f"{config.vocab_size} tokens; set draft_vocab_size: 0, or head_rank: null"
            )
        if rank > d:
            raise DeepSpecError(
                f"head_rank {rank} is above {d}, the width of the states and the rank of the target's own head; "
                "choose a smaller one"
            )
        self.down = nn.Linear(d, rank, bias=False)  # A
        self.up = nn.Linear(rank, columns, bias=False)  # B

    @torch.no_grad()
    def begin(self, head: Tensor, states: Tensor, counts: Tensor) -> None:
        """Begin as the matrix of this rank that comes nearest to a head W.

        It minimises Σ_v n_v Σ_h (w_v · h − b_v · A h)², the squared errors of the logits of states h, of each token as
        often as it is to be learnt. That is a truncated singular value decomposition of N^½ W C^½, C = Σ h hᵀ, whose
        right singular vectors are the eigenvectors of a [d, d] matrix.

        Args:
            head: W [vocab, d].
            states: of the target behind its last norm, [tokens, d].
            counts: n [vocab], how often each token is to be learnt.
        """
        n = counts.to(head)
        n = n + _LEAST_COUNT * n.mean()  # a token that was never seen counts too
        gram = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
        for rows, weights in zip(head.split(_ROWS), n.split(_ROWS), strict=True):
            gram += (rows.T @ (rows * weights[:, None])).double()
        states = states.to(head)
        spread, directions = torch.linalg.eigh((states.T @ states).double())
        root = spread.clamp_min(_LEAST_SPREAD * spread.mean()).sqrt()
        half = (directions * root) @ directions.T  # C^½
        kept = torch.linalg.eigh(half @ gram @ half).eigenvectors[:, -self.down.out_features :]
        scale = len(states) ** 0.5  # A h of size 1
        self.down.weight.copy_(kept.T @ (directions / root) @ directions.T * scale)
        self.up.weight.copy_(head @ (half @ kept / scale).to(head))
