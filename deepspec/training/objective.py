"""What is minimised: the DSpark loss of a batch of blocks, and the figures that describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deepspec.drafters.network import Network
from deepspec.training.batches import Batch
from deepspec.training.losses import TargetLaw, confidence_loss, expected_tau, head_loss, position_weights

if TYPE_CHECKING:
    from deepspec.config import LossParams


class BlockObjective(nn.Module):
    """The drafter with its loss as one module, so that a data-parallel wrapper sees every parameter used.

    0.1·CE + 0.9·‖q − p‖₁ + 1.0·BCE by default, each position weighted exp(−(k−1)/γ_w).
    """

    def __init__(self, model: Network, params: LossParams):
        super().__init__()
        self.model = model
        self.params = params
        to_draft = torch.full((model.config.vocab_size,), -1)
        to_draft[model.draft_ids] = torch.arange(len(model.draft_ids))
        self.register_buffer("to_draft", to_draft, persistent=False)
        self.register_buffer(
            "decay", position_weights(model.config.block_size, params.position_decay), persistent=False
        )

    def weights(self, batch: Batch) -> Tensor:
        """float32 [b, blocks, γ]"""
        return batch.valid * self.decay

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over the batch's positions (divide by the sum of `weights`), and sums to report."""
        model = self.model
        device = batch.features.device.type
        compute = batch.features.dtype if torch.is_autocast_enabled(device) else torch.float32
        hidden = model(batch.features.to(compute), batch.tokens, batch.anchors)  # [b, blocks, γ, d]
        gamma = hidden.shape[2]
        previous = batch.anchors[..., None] + torch.arange(gamma, device=hidden.device)
        previous = previous.clamp(max=batch.tokens.shape[1] - 1).flatten(1)
        previous = batch.tokens.gather(1, previous).view(hidden.shape[:3])
        added = model.corrections(hidden, previous)
        flat = hidden.flatten(0, 2)
        head = model.lm_head.weight.to(compute)
        latents = flat.new_zeros(len(flat), 0) if added.latents is None else added.latents.flatten(0, 2)
        w2 = head.new_zeros(len(head), 0) if added.w2 is None else added.w2
        law = TargetLaw(
            batch.hidden.flatten(0, 2).to(compute),
            batch.log_norm.flatten(),
            self.to_draft[batch.labels.flatten()],
        )
        weights = self.weights(batch).flatten()
        with torch.autocast(device, enabled=False):
            loss, alpha, terms = head_loss(
                flat.to(compute),
                latents.to(compute),
                w2.to(compute),
                head,
                law,
                weights,
                self.params.ce,
                self.params.tv,
            )
        confidence = loss.new_zeros(())
        if added.confidence is not None:
            confidence = confidence_loss(added.confidence.flatten(), alpha, weights)
        with torch.no_grad():
            total = (terms * weights[:, None]).sum(0)
            tau = expected_tau(alpha.view(-1, gamma), batch.valid.flatten(0, 1)).sum()
        sums = {
            "ce": total[0],
            "tv": total[1],
            "confidence": confidence.detach(),
            "tau": tau,
            "blocks": tau.new_tensor(batch.anchors.numel()),
            "positions": batch.valid.sum().float(),
        }
        return loss + self.params.confidence * confidence, sums
