"""Test-time adaptation, an experiment: a draft that goes on learning from the engine's own verifications.

A round's target pass says what the target's law is at every token that is committed (arXiv 2605.09329). An
`AdaptingDrafter` keeps the newest of them with the features that the draft reads and, once enough have come, takes a
step of training on blocks that start there, by the loss of training. An answer begins with the draft as it is on the
disk, which never changes.

It is lossless by construction. Weights change at the beginning of `propose` alone, so a proposal is drawn, and its laws
are reported, by weights that stay until it is verified. They follow from what was committed before, and from nothing
that the coming verification decides (non-anticipation).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession, Proposal, Session
from deepspec.drafters.load import load_drafter, open_draft
from deepspec.drafters.loss_params import LossParams
from deepspec.drafters.module_stack import ModuleStack
from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.drafters.window import for_decoding
from deepspec.errors import DeepSpecError
from deepspec.target.ends import H_LAST
from deepspec.target.model import Target
from deepspec.training.batches import Batch
from deepspec.training.objective import BlockObjective

N = TypeVar("N", bound=Network)


@dataclass(frozen=True)
class Adaptation:
    """How a draft learns while it decodes.

    Args:
        every: committed tokens between two steps.
        blocks: of a step, one at each of the newest places.
        context: newest tokens that they see.
        lr: of AdamW.
    """

    every: int = 32
    blocks: int = 64
    context: int = 512
    lr: float = 3e-4


def load_adapting(path: str | Path, target: Target, how: Adaptation = Adaptation()) -> AdaptingDrafter:
    """Load a draft directory as one that learns while it decodes, a request at a time.

    Raises:
        DeepSpecError: what `load_drafter` refuses, or a draft that is not one network which reads the target's states.
    """
    kind, checkpoint = open_draft(Path(path), target)
    algorithm = algorithms()[kind]
    if algorithm.read is None or algorithm.standalone:
        raise DeepSpecError(f"{path}: a {kind} does not learn while it decodes")
    draft = load_drafter(path, target)
    if isinstance(draft, ModuleStack):
        raise DeepSpecError(f"{path}: several next-token modules do not learn while they decode")
    network = algorithm.read(for_decoding(kind, checkpoint), target)
    return AdaptingDrafter(draft, network.eval(), target, how)


class AdaptingDrafter(Drafter):
    """A draft whose sessions learn. It reads the target's last state too, whose law is what is learnt.

    Args:
        draft: as loaded; what an answer begins with.
        network: its own, in float32.
    """

    def __init__(self, draft: Drafter, network: Network, target: Target, how: Adaptation):
        self.draft, self.network, self.target, self.how = draft, network.to(target.device), target, how
        self.layers, self.looks_up = (*draft.layers, H_LAST), draft.looks_up
        self.block_size, self.vocab_size = draft.block_size, draft.vocab_size
        self.digest, self.temperatures = draft.digest, draft.temperatures
        self._drafting = deepcopy(network).to(target.device, target.dtype)

    @property
    def trained(self) -> Drafter:
        """Return the draft itself, which costs are measured of."""
        return self.draft

    def session(self, slots: int) -> Session:
        """Start a session of one request.

        Raises:
            DeepSpecError: more than one slot.
        """
        if slots != 1:
            raise DeepSpecError(
                f"a draft that learns while it decodes takes one request at a time, not {slots}: "
                "what one draws would depend on the others"
            )
        return AdaptingSession(self)

    @torch.no_grad()
    def as_learnt(self, network: Network) -> Drafter:
        """Return the draft with the weights that a network has by now."""
        for own, learnt in zip(self._drafting.parameters(), network.parameters(), strict=True):
            if learnt.requires_grad:
                own.copy_(learnt)
        make = cast("Callable[[Network, Target], Drafter]", type(self.draft))
        made = make(copied(self._drafting), self.target)
        made.temperatures = self.temperatures
        return made


class AdaptingSession(Session):
    """Follows one request with the draft's own session, and learns from what is committed."""

    def __init__(self, drafter: AdaptingDrafter):
        self.drafter = drafter
        self.inner = cast(GrowingSession, drafter.draft.session(1))
        self._forget()

    def _forget(self) -> None:
        self.inner.drafter = self.drafter.draft
        self.learner: Learner | None = None
        self.tokens: list[int] = []  # the newest with a target pass
        self.states: list[Tensor] = []  # of the same tokens, [·, layers·d]
        self.fresh = 0  # of them, tokens since the last step

    def begin(self, row: int) -> None:
        self._forget()
        self.inner.begin(row)

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        if features is None:
            raise ValueError("a draft that learns reads the target's states")
        width = features.shape[-1] - self.drafter.target.hidden_size
        self.inner.extend(row, tokens, features[:, :width])
        self.tokens += tokens
        self.states.append(features)
        self.fresh += len(tokens)

    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        if self.fresh >= self.drafter.how.every:
            with torch.inference_mode(False):
                self._learn()
        return self.inner.propose(asks)

    def move(self, source: int, destination: int) -> None:
        self.inner.move(source, destination)

    def _learn(self) -> None:
        """Take a step on the newest blocks, and draft by its weights from now on."""
        keep = self.drafter.how.context
        self.tokens, states = self.tokens[-keep:], torch.cat(self.states)[-keep:]
        self.states, self.fresh = [states], 0
        batch = self._batch(states)
        if batch is not None:
            self.learner = self.learner or Learner(self.drafter)
            self.learner.step(batch)
            self.inner.drafter = self.drafter.as_learnt(self.learner.network)

    def _batch(self, states: Tensor) -> Batch | None:
        """Return the newest blocks whose tokens are all committed; None where there is none yet.

        Args:
            states: [n, layers·d], that of the target's last state behind those that the draft reads.
        """
        n, gamma, target = len(self.tokens), self.drafter.block_size, self.drafter.target
        first = max(n - gamma - self.drafter.how.blocks, 1)
        anchors = torch.arange(first, n - gamma, device=states.device)
        if not len(anchors):
            return None
        features, hidden = states.split((states.shape[1] - target.hidden_size, target.hidden_size), 1)
        log_norm = torch.zeros(n, device=states.device)
        log_norm[first:] = target.log_norm(hidden[first:])
        tokens = torch.tensor(self.tokens, device=states.device)
        places = anchors[:, None] + torch.arange(gamma, device=states.device)
        whole = torch.ones_like(places, dtype=torch.bool)
        parts = (features, tokens, hidden, log_norm, anchors, places, tokens[places + 1], whole)
        return Batch(*(part[None] for part in parts))


class Learner:
    """A request's own copy of a network, with its optimizer."""

    def __init__(self, drafter: AdaptingDrafter):
        self.network, target = copied(drafter.network), drafter.target
        self.objective = BlockObjective(self.network, LossParams()).to(target.device)
        self.learnt = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, drafter.how.lr, weight_decay=0.0)
        self.autocast = torch.autocast(
            target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16
        )

    @torch.enable_grad()
    def step(self, batch: Batch) -> None:
        """Learn from some blocks; a gradient that is not finite teaches nothing."""
        self.optimizer.zero_grad()
        with self.autocast:
            loss, _ = self.objective(batch)
        (loss / self.objective.weight(batch)).backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)):
            self.optimizer.step()


def copied(network: N) -> N:
    """Return a copy that shares whatever is not trained."""
    shared = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    return deepcopy(network, dict[int, object](shared))
