"""The sequential heads of DSpark: from the token before and the backbone's state to a correction of the logits.

B_k = W₂ z_k with a latent z_k of rank r, where e = W₁[x_{k−1}]:

    vanilla   z_k = e
    gated     z_k = σ(W_g [h_k; e] + b_g) ⊙ e
    rnn       z_k = tanh(o),  s_k = σ(g) ⊙ s_{k−1} + (1 − σ(g)) ⊙ tanh(c),  s_0 = 0,
              where (g, c, o) = W [s_{k−1}; e; h_k] + b

(DeepSeek 2026, DSpark §3.1; the names are those of the published repository.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspec.drafters.network import NormalisedLinear
from deepspec.errors import DeepSpecError, nearest

KINDS = ("vanilla", "gated", "rnn")


class MarkovHead(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.kind = config.markov_head_type
        if self.kind not in KINDS:
            raise DeepSpecError(
                f"unknown markov_head_type {self.kind!r}; known: {', '.join(KINDS)}{nearest(self.kind, KINDS)}"
            )
        d, r = config.hidden_size, config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, r)
        self.markov_w2 = nn.Linear(r, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(d + r, r)
        elif self.kind == "rnn":
            self.joint_proj = NormalisedLinear(2 * r + d, 3 * r, bias=True)

    @torch.no_grad()
    def begin(self) -> None:
        """Begin as no correction: the backbone leads. The rnn head's latent begins as the vanilla one's, tanh(e)."""
        self.markov_w2.weight.zero_()
        if self.kind == "rnn":
            r = self.markov_w2.in_features
            self.joint_proj.bias[2 * r :].zero_()
            out = self.joint_proj.weight[2 * r :].zero_()
            out[:, r : 2 * r].fill_diagonal_(1)

    def set_scale(self) -> None:
        """Divide the rnn head's inputs s and h, whose many channels of size 1 would drown e.

        At one learning rate for all they saturate tanh in a few steps.
        """
        if self.kind == "rnn":
            r = self.markov_w2.in_features
            d = self.joint_proj.in_features - 2 * r
            sizes = (r, r**0.5), (r, 1.0), (d, d**0.5)
            self.joint_proj.set_scale(torch.cat([torch.full((count,), size) for count, size in sizes]))

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """e [..., r] and h_k [..., d] → z_k and s_k, both [..., r]; without a state s_{k−1} is zero."""
        if self.kind == "vanilla":
            return embedded, embedded
        if self.kind == "gated":
            gate = self.gate_proj(torch.cat((hidden, embedded), -1)).sigmoid()
            return gate * embedded, embedded
        state = torch.zeros_like(embedded) if state is None else state
        gate, candidate, out = self.joint_proj(torch.cat((state, embedded, hidden), -1)).chunk(3, -1)
        gate = gate.sigmoid()
        return out.tanh(), gate * state + (1 - gate) * candidate.tanh()

    def unrolled(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """e [..., γ, r] and h [..., γ, d] of whole blocks → z [..., γ, r]"""
        if self.kind != "rnn":
            return self.step(embedded, hidden)[0]
        state, latents = None, []
        for k in range(hidden.shape[-2]):
            latent, state = self.step(embedded[..., k, :], hidden[..., k, :], state)
            latents.append(latent)
        return torch.stack(latents, -2)
