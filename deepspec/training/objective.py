"""What is minimised: the loss of a batch of blocks, and the figures that describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deepspec.drafters.network import Network
from deepspec.training.batches import Batch
from deepspec.training.losses import (
    HeadLoss,
    TargetLaw,
    confidence_loss,
    expected_tau,
    head_loss,
)

if TYPE_CHECKING:
    from deepspec.drafters.loss_params import LossParams


class BlockObjective(nn.Module):
    """The drafter with its loss as one module, so that a data-parallel wrapper sees every parameter used."""

    to_draft: Tensor  # [vocab], the column of each target id; -1 where it has none

    def __init__(self, model: Network, params: LossParams):
        super().__init__()
        self.model = model
        self.params = params
        self._no_split_modules = sorted({type(block).__name__ for block in model.blocks()})  # FSDP2's units
        self.budget = None if params.budget_mib is None else int(params.budget_mib * 2**20)
        self.draft_ids = model.draft_ids.clone()  # its columns, whatever becomes of the model's own tensors
        to_draft = torch.full((model.config.vocab_size,), -1)
        to_draft[model.draft_ids] = torch.arange(len(model.draft_ids))
        self.register_buffer("to_draft", to_draft, persistent=False)

    def weight(self, batch: Batch) -> Tensor:
        """Return the divisor of the loss of these blocks."""
        return self.params.positions.total(batch.valid)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of losses over the batch's positions, and sums to report.

        In a training step of a loss that does not need them, TV and expected τ are not among the sums.
        """
        found, scores = self._head_loss(batch)
        valid = batch.valid.flatten(0, 1)
        loss, confidence = found.loss, found.loss.new_zeros(())
        if scores is not None:
            confidence = confidence_loss(scores.flatten(), found.alpha, found.weights)
        with torch.no_grad():
            ce, kl, tv = (found.terms * found.weights[:, None]).sum(0)
            sums = {
                "ce": ce,
                "kl": kl,
                "confidence": confidence.detach(),
                "blocks": loss.new_tensor(len(valid)),
                "positions": valid.sum().to(loss.dtype),
            }
            if found.measured:
                sums |= {"tv": tv, "tau": expected_tau(found.alpha.view(valid.shape), valid).sum()}
        return loss + self.params.confidence * confidence, sums

    def acceptance(self, batch: Batch) -> Tensor:
        """Return α of each position, [b, blocks, γ]."""
        return self._head_loss(batch)[0].alpha.view(batch.valid.shape)

    @torch.no_grad()
    def greedy_chains(self, batch: Batch) -> Tensor:
        """Draft each block greedily, every token fed to the next: target ids [b, γ].

        One block a row, of which the tokens after the anchor do not count.
        """
        model, tokens, chain = self.model, batch.tokens.clone(), []
        for k in range(batch.places.shape[-1]):
            hidden = model(batch.features.float(), tokens, batch.anchors)
            outputs = model.outputs(hidden, tokens.gather(1, batch.places[:, 0])[:, None])
            here = [(x[:, 0, k], w) for x, w in outputs.factors]
            logits = outputs._replace(factors=here).logits()  # [b, columns]
            chain.append(self.draft_ids.to(logits.device)[logits.argmax(-1)])
            tokens.scatter_(1, batch.anchors + k + 1, chain[-1][:, None])
        return torch.stack(chain, -1)

    def _head_loss(self, batch: Batch) -> tuple[HeadLoss, Tensor | None]:
        """Return the losses of all positions, and the confidence head's logits [b, blocks, γ] where there is one."""
        model = self.model
        device = batch.features.device.type
        compute = batch.features.dtype if torch.is_autocast_enabled(device) else torch.float32
        hidden = model(batch.features.to(compute), batch.tokens, batch.anchors)  # [b, blocks, γ, d]
        outputs = model.outputs(hidden, self._previous(batch))
        shared = model.lm_head.weight  # converted once, though two laws are made with it
        head = shared.to(compute)
        factors = [
            (x.flatten(0, 2).to(compute), head if w is shared else w.to(compute)) for x, w in outputs.factors
        ]
        rows, n = batch.tokens.shape
        law = TargetLaw(
            batch.hidden.flatten(0, 1).to(compute),
            batch.log_norm.flatten(),
            head,
            (batch.places + n * torch.arange(rows, device=batch.places.device)[:, None, None]).flatten(),
            self.to_draft[batch.labels.flatten()],
            model.target_transform,
        )
        with torch.autocast(device, enabled=False):
            mixture = self.params, self.params.positions, batch.valid.flatten(0, 1), self.budget
            measured = outputs.confidence is not None or not torch.is_grad_enabled()
            found = head_loss(factors, law, *mixture, outputs.candidates, measured)
            if outputs.candidates is not None:  # whose choice the first product alone decides
                first = head_loss(factors[:1], law, *mixture, measured=measured)
                found = found._replace(loss=found.loss + first.loss)
        return found, outputs.confidence

    def _previous(self, batch: Batch) -> Tensor:
        """Return the true token before each prediction, int64 [b, blocks, γ]."""
        return batch.tokens.gather(1, batch.places.flatten(1)).view(batch.places.shape)
