"""The target's states for some sequences, by a pass of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.errors import DeepSpecError
from deepspec.features.sequences import Sequences
from deepspec.target.attention import ForwardPass
from deepspec.target.ends import H_LAST
from deepspec.target.model import Target

LOG_NORM = "log_norm"
Row = dict[int | str, Tensor]  # layer → [n, d], `H_LAST` among them; LOG_NORM → float32 [n]


class Extractor:
    """Runs a target over sequences.

    Args:
        target: with its layers.
        sequences: in the order of the data set.
        layers: whose states are wanted beside the post-norm one.
    """

    def __init__(self, target: Target, sequences: Sequences, layers: tuple[int, ...]):
        self.target, self.sequences, self.layers = target, sequences, layers

    def rows(self, indices: list[int]) -> list[Row]:
        """Compute the states of some sequences in one pass, on the target's device and in its dtype.

        Raises:
            DeepSpecError: the target's hidden states are not finite.
        """
        ids = pad_sequence([torch.tensor(self.sequences[i].ids) for i in indices], batch_first=True)
        ids = ids.to(self.target.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        wanted = (*self.layers, H_LAST)
        step = ForwardPass(positions, wanted=wanted)  # causal: padding at the end is never seen
        self.target.forward(ids, step)
        rows = []
        for row, i in enumerate(indices):
            n = len(self.sequences[i].ids)
            found: Row = {layer: step.features[layer][row, :n] for layer in wanted}
            found[LOG_NORM] = self.log_norm(found[H_LAST])
            if not bool(torch.isfinite(found[LOG_NORM]).all()):
                raise DeepSpecError(f"conversation {i}: the target's logits are not finite")
            rows.append(found)
        return rows

    def log_norm(self, hidden: Tensor) -> Tensor:
        """Compute the log-normaliser of the law at post-norm states [n, d], in chunks."""
        return torch.cat([self.target.logits(part).float().logsumexp(-1) for part in hidden.split(256)])
