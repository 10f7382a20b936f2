"""The engine: rounds of draft, one target pass, verification; many requests at once, refilled as they finish.

A request's last committed token, the anchor, has not been through the target yet. A round drafts a tree below the
anchor, runs the target once over anchor and tree, keeps the path that the rule accepts and one token of the
target's own, and compacts the cache to that path. Plain decoding is the round without a draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepspec.attention import KVCache, Step
from deepspec.decoding.request import Generation, Request, Sampling, Stats
from deepspec.decoding.sampling import draw, probabilities, sample
from deepspec.decoding.scheduler import Adaptive
from deepspec.decoding.verify import CHAIN_RULES, walk
from deepspec.drafters.base import Drafter, Proposal
from deepspec.errors import DeepSpecError
from deepspec.target import Target

PREFILL = 512  # prompt tokens a pass, which bounds the attention mask
_NOTHING = Proposal()


class Slot:
    """One request in flight. `tokens` are all committed ids; the cache holds all but the last, the anchor."""

    def __init__(
        self, request: Request, target: Target, drafter: Drafter | None, controller: Adaptive | None
    ):
        self.request = request
        self.tokens = list(request.prompt_ids)
        self.stop_ids = target.stop_ids if request.stop_ids is None else request.stop_ids
        self.limit = min(request.max_new_tokens, target.max_length - len(self.tokens))
        self.rng = torch.Generator().manual_seed(request.seed)
        self.stats = Stats()
        self.state = drafter.begin() if drafter else None
        self.pace = controller.pace() if controller else None
        self.finish_reason: str | None = None
        self.error: str | None = None

    @property
    def cached(self) -> int:
        return len(self.tokens) - 1

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.rng, dtype=torch.float64))

    def pick(self, weights: Tensor) -> int:
        """A token with probability proportional to `weights` [vocab]."""
        uniform = torch.tensor([self.uniform()], dtype=torch.float64, device=weights.device)
        return int(draw(weights[None], uniform))

    def commit(self, accepted: list[int], last: int) -> int:
        """Append the accepted tokens and the target's own, cut at a stop token or the limit. Returns the count."""
        room = self.limit - len(self.new_tokens)
        tokens = [*accepted, last][:room]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is not None:
            tokens = tokens[: stop + 1]
            self.finish_reason = "stop"
        elif len(tokens) == room:
            self.finish_reason = "length"
        self.tokens += tokens
        self.stats.accepted.append(len(tokens) - 1)
        if self.request.on_tokens:
            self.request.on_tokens(tokens, min(len(accepted), len(tokens)))
        return len(tokens)

    def result(self) -> Generation:
        reason = "error" if self.error else self.finish_reason
        return Generation(
            self.request.id, self.request.prompt_ids, self.new_tokens, reason, self.stats, self.error
        )


class Engine:
    """Decodes up to `batch_size` requests at once with one target, one drafter (or none) and one chain rule.

    Args:
        verify: the rule for sampled chains, "block" or "standard"; deterministic proposals are always walked.
        controller: decides before each round whether drafting pays; None always drafts.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        batch_size: int = 1,
        verify: str = "block",
        controller: Adaptive | None = None,
    ):
        if verify not in CHAIN_RULES:
            raise DeepSpecError(f"unknown verification rule {verify!r}; known: {', '.join(CHAIN_RULES)}")
        self.target = target
        self.drafter = drafter
        self.rule = CHAIN_RULES[verify]
        self.controller = controller
        self.batch_size = batch_size
        self.layers = drafter.layers if drafter else ()
        self.cache = KVCache(batch_size, 256)
        self.slots: list[Slot] = []

    @torch.inference_mode()
    def run(self, next_request: Callable[[], Request | None]) -> Iterator[Generation]:
        """Poll `next_request` whenever a slot is free; yield each request as it finishes.

        Ends when `next_request` returned None and nothing is in flight. A bad request finishes with an error of
        its own and leaves the others alone.
        """
        while True:
            while len(self.slots) < self.batch_size and (request := next_request()) is not None:
                error = self._problem(request)
                if error:
                    yield Generation(request.id, request.prompt_ids, [], "error", Stats(), error)
                else:
                    self._admit(request)
            if not self.slots:
                return
            self._round()
            yield from self._finished()

    def _problem(self, request: Request) -> str | None:
        size = len(request.prompt_ids)
        if not size:
            return "the prompt is empty"
        if size >= self.target.max_length:
            return f"the prompt has {size} tokens; the target takes {self.target.max_length}"
        if request.max_new_tokens < 1:
            return f"max_new_tokens must be >= 1, found {request.max_new_tokens}"
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.target.vocab_size:
            return f"the prompt has token ids outside the target's vocabulary of {self.target.vocab_size}"
        return None

    def _admit(self, request: Request) -> None:
        """Prefill all of the prompt but its last token, which becomes the anchor."""
        slot = Slot(request, self.target, self.drafter, self.controller)
        began = self._clock()
        self.cache.reserve(len(slot.tokens) + slot.limit + (self.drafter.block_size if self.drafter else 0))
        row = len(self.slots)
        for start in range(self._shared_prefix(slot, row), slot.cached, PREFILL):
            ids = torch.tensor(
                [slot.tokens[start : min(start + PREFILL, slot.cached)]], device=self.target.device
            )
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            step = Step(positions, None, self.cache, row, [start], self.layers)
            self.target.forward(ids, step)
            if self.drafter:
                absorbing = self._clock()
                self.drafter.extend(
                    slot.state, ids[0].tolist(), self._features(step)[0] if self.layers else None
                )
                slot.stats.draft_s += self._clock() - absorbing
        self.slots.append(slot)
        slot.stats.prefill_s = self._clock() - began - slot.stats.draft_s

    def _shared_prefix(self, slot: Slot, row: int) -> int:
        """Copy the cache of the longest prompt beginning shared with a request in flight; returns its length.

        Templates and system prompts repeat. A drafter that reads features needs every token's pass, so not then.
        """
        if self.layers or not self.slots:
            return 0
        lengths = [_common(slot.tokens, other.tokens, min(slot.cached, other.cached)) for other in self.slots]
        source = max(range(len(lengths)), key=lengths.__getitem__)
        self.cache.move(source, row, lengths[source])
        if self.drafter:
            self.drafter.extend(slot.state, slot.tokens[: lengths[source]], None)
        return lengths[source]

    def _clock(self) -> float:
        """Seconds; on a GPU all that was launched has ended."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    def _round(self) -> None:
        began = self._clock()
        proposals = [self._propose(slot) for slot in self.slots]
        drafted = self._clock()
        step, hidden = self._verify_pass(proposals)
        outcomes = self._outcomes(proposals, hidden)
        verified = self._clock()
        for row, (slot, proposal, outcome) in enumerate(zip(self.slots, proposals, outcomes, strict=True)):
            self._commit(row, slot, proposal, outcome, step)
        ended = self._clock()
        share = 1 / len(self.slots)
        for slot in self.slots:
            slot.stats.draft_s += (drafted - began) * share
            slot.stats.verify_s += (verified - drafted) * share
            slot.stats.host_s += (ended - verified) * share

    def _propose(self, slot: Slot) -> Proposal:
        """The drafter's proposal, cut to what the request may still commit."""
        room = slot.limit - len(slot.new_tokens) - 1
        if self.drafter is None or room < 1 or (slot.pace and not slot.pace.drafts()):
            return _NOTHING
        proposal = self.drafter.propose(slot.state, slot.tokens[-1], slot.request.sampling, slot.rng)
        return proposal.cut(room)

    def _verify_pass(self, proposals: list[Proposal]) -> tuple[Step, Tensor]:
        """Run the target over every anchor and its tree. Returns the step and h_last [batch, n, d]."""
        n = 1 + max(len(proposal.tokens) for proposal in proposals)
        ids, positions = [], []
        for slot, proposal in zip(self.slots, proposals, strict=True):
            padding = n - 1 - len(proposal.tokens)
            ids.append([slot.tokens[-1], *proposal.tokens] + [0] * padding)
            positions.append(
                [slot.cached + depth for depth in (0, *proposal.depths)] + [slot.cached] * padding
            )
        device = self.target.device
        starts = [slot.cached for slot in self.slots]
        self.cache.reserve(max(starts) + n)
        visible = None if all(p.is_chain for p in proposals) else _tree_mask(proposals, starts, n).to(device)
        step = Step(torch.tensor(positions, device=device), visible, self.cache, 0, starts, self.layers)
        return step, self.target.forward(torch.tensor(ids, device=device), step)

    def _outcomes(self, proposals: list[Proposal], hidden: Tensor) -> list[tuple[list[int], int] | str]:
        """Per row the accepted nodes and the target's next token, or what went wrong."""
        logits = self.target.logits(hidden)  # [batch, n, vocab]
        finite = torch.isfinite(logits.amax(-1)).all(-1).tolist()
        samplings = [slot.request.sampling for slot in self.slots]
        if all(sampling.temperature == 0 for sampling in samplings):
            best = logits.argmax(-1).tolist()
            outcomes = [walk(p, lambda node, row=row: best[row][node + 1]) for row, p in enumerate(proposals)]
        elif not any(p.tokens for p in proposals) and len(set(samplings)) == 1:
            tokens = sample(logits[:, 0], samplings[0], lambda row: self.slots[row].uniform())
            outcomes = [([], token) for token in tokens]
        else:
            outcomes = [
                self._verify(slot, p, logits[row]) if finite[row] else None
                for row, (slot, p) in enumerate(zip(self.slots, proposals, strict=True))
            ]
        return [
            outcome if ok else "the target's logits are not finite"
            for outcome, ok in zip(outcomes, finite, strict=True)
        ]

    def _verify(self, slot: Slot, proposal: Proposal, logits: Tensor) -> tuple[list[int], int]:
        """One row by its own rule. logits [n, vocab]; row node + 1 belongs to a node."""
        sampling = slot.request.sampling
        if sampling.temperature == 0:
            best = logits.argmax(-1).tolist()
            return walk(proposal, lambda node: best[node + 1])
        if proposal.probs is None:
            return walk(proposal, lambda node: slot.pick(probabilities(logits[node + 1], sampling)))
        laws = probabilities(logits[: len(proposal.tokens) + 1], sampling).cpu()
        return self.rule(proposal, lambda node: laws[node + 1], slot.uniform, slot.pick)

    def _commit(self, row: int, slot: Slot, proposal: Proposal, outcome: tuple | str, step: Step) -> None:
        if isinstance(outcome, str):
            slot.error = outcome
            return
        nodes, last = outcome
        anchor, start = slot.tokens[-1], slot.cached
        accepted = [proposal.tokens[node] for node in nodes]
        kept = slot.commit(accepted, last)
        # A stop token inside the draft ends the answer: the rest of the block was never judged.
        slot.stats.drafted.append(
            min(max(proposal.depths, default=0), kept - 1 if kept <= len(accepted) else 1 << 30)
        )
        if slot.pace:
            slot.pace.observe(bool(proposal.tokens), kept)
        if slot.finish_reason:
            return
        passed = [0, *(node + 1 for node in nodes)]  # rows of this pass that are now context
        self.cache.compact(row, start, passed)
        if self.drafter:
            features = self._features(step)[row, passed] if self.layers else None
            self.drafter.extend(slot.state, [anchor, *accepted], features)

    def _features(self, step: Step) -> Tensor:
        """[batch, n, len(layers)·d]"""
        return step.once("features", lambda: torch.cat([step.features[layer] for layer in self.layers], -1))

    def _finished(self) -> Iterator[Generation]:
        """Take finished requests out; the last slot moves into the gap, so that the batch stays contiguous."""
        for row in reversed(range(len(self.slots))):
            slot = self.slots[row]
            if not (slot.finish_reason or slot.error):
                continue
            last = len(self.slots) - 1
            if row != last:
                self.cache.move(last, row, self.slots[last].cached)
                self.slots[row] = self.slots[last]
            self.slots.pop()
            yield slot.result()


def stream(
    target: Target,
    drafter: Drafter | None,
    next_request: Callable[[], Request | None],
    batch_size: int = 1,
) -> Iterator[Generation]:
    """Decode requests as they come, `batch_size` at once; see `Engine.run`."""
    return Engine(target, drafter, batch_size).run(next_request)


def generate(
    target: Target,
    drafter: Drafter | None,
    prompt_ids: list[int] | list[list[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    verify: str = "block",
    on_tokens: Callable[[list[int], int], None] | None = None,
    controller: Adaptive | None = None,
) -> list[Generation]:
    """Continue one prompt or a batch of them.

    Args:
        drafter: None decodes plainly, in the same engine.
        prompt_ids: token ids, or a list of such lists (decoded together).
        temperature, top_k, top_p, min_p: the sampler; its law is what is preserved.
        seed: of the first prompt; prompt i takes seed + i.
        verify: rule for sampled chains, "block" (default) or "standard".
        on_tokens: called with (tokens, accepted) after each round of a prompt.
        controller: skips drafting where it does not pay.

    Returns:
        A `Generation` for each prompt, in order.

    Raises:
        DeepSpecError: empty or over-long prompt, ids outside the vocabulary, bad sampler, non-finite logits.
    """
    many = bool(prompt_ids) and isinstance(prompt_ids[0], list)
    prompts = prompt_ids if many else [prompt_ids]
    sampling = Sampling(temperature, top_k, top_p, min_p)
    requests = iter(
        [
            Request(ids, max_new_tokens, sampling, seed + i, None, i, on_tokens)
            for i, ids in enumerate(prompts)
        ]
    )
    engine = Engine(target, drafter, min(len(prompts), 64), verify, controller)
    done = sorted(engine.run(lambda: next(requests, None)), key=lambda generation: generation.id)
    for generation in done:
        if generation.error:
            raise DeepSpecError(f"prompt {generation.id}: {generation.error}" if many else generation.error)
    return done


def _common(one: list[int], other: list[int], most: int) -> int:
    """Length of the common beginning, at most `most`."""
    return next((i for i in range(most) if one[i] != other[i]), most)


def _tree_mask(proposals: list[Proposal], starts: list[int], n: int) -> Tensor:
    """bool [batch, n, max(starts) + n]: each node sees the cached context, the anchor and its own ancestors."""
    visible = torch.zeros(len(proposals), n, max(starts) + n, dtype=torch.bool)
    for row, (proposal, start) in enumerate(zip(proposals, starts, strict=True)):
        visible[row, :, : start + 1] = True
        for node, parent in enumerate(proposal.parents):
            if parent >= 0:
                visible[row, node + 1] = visible[row, parent + 1]
            visible[row, node + 1, start + node + 1] = True
    return visible
