"""How likely the target finds answers that it was not seen to write: one pass over each row."""

from __future__ import annotations

from typing import Any

import torch

from deepspec.target.attention import ForwardPass

CHUNK = 256  # tokens whose laws are held at once


class Likelihood:
    """Adds `logprob` and `surprise` to rows.

    Of words drawn from the target's own law, log p(token) is −entropy on average: their sum, the surprise, is about 0,
    above it where the temperature was lower, and well below it for the words of somebody else.

    Args:
        target: a target with a model; another kind is asked nothing.
    """

    def __init__(self, target: Any) -> None:
        self.target = target

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add both figures to each row, in nats a token of its answers."""
        if not hasattr(self.target, "forward"):
            return
        for row in rows:
            row["logprob"], row["surprise"] = self.of(row["input_ids"], row["loss_mask"])

    @torch.inference_mode()
    def of(self, ids: list[int], mask: list[int]) -> tuple[float, float]:
        """Return mean log p and mean (log p + entropy) over the tokens that `mask` marks."""
        device = self.target.device
        tokens = torch.tensor(ids, device=device)
        hidden = self.target.forward(tokens[None], ForwardPass(torch.arange(len(ids), device=device)[None]))[
            0
        ]
        marked = [i for i, m in enumerate(mask) if m and i]
        found = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(marked), CHUNK):
            at = torch.tensor(marked[start : start + CHUNK], device=device)
            law = self.target.logits(hidden[at - 1]).float().log_softmax(-1)  # [tokens, vocab]
            logp = law.gather(-1, tokens[at, None])[:, 0]
            entropy = -(law.exp() * law).nan_to_num().sum(-1)
            found += torch.stack([logp.sum(), (logp + entropy).sum()]).cpu().double()
        mean = found / max(len(marked), 1)
        return round(float(mean[0]), 4), round(float(mean[1]), 4)
