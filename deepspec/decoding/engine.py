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

from deepspec.decoding.drafter import Ask, Drafter
from deepspec.decoding.request import Generation, Request, Sampling, Stats
from deepspec.decoding.sampling import best, probabilities, sample
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.slot import Slot
from deepspec.decoding.tree import MAX_NODES, Chain, Proposal, Shape
from deepspec.decoding.verify import check_rule, rule_for, walk
from deepspec.errors import DeepSpecError
from deepspec.target.attention import Step
from deepspec.target.model import Target

PREFILL = 512  # prompt tokens a pass, which bounds the attention mask
_NOTHING = Proposal()
Outcome = tuple[list[int], int] | str  # accepted nodes and the target's next token, or what went wrong


class Engine:
    """Decodes up to `batch_size` requests at once with one target and one drafter (or none).

    Args:
        tree: the shape that the drafter's laws grow into; None is a chain.
        verify: rule for sampled proposals: "standard" or "block" for chains, "recursive" or "traversal" for
            trees; None takes the best one. Deterministic proposals are always walked.
        controller: decides before each round who drafts, and after it how much is verified; None drafts and
            verifies everything.
        max_length: tokens a request may have, prompt included; None is the target's own limit.
        on_round: called with each verified proposal and how many of its tokens stood.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        batch_size: int = 1,
        tree: Shape | None = None,
        verify: str | None = None,
        controller: Controller | None = None,
        max_length: int | None = None,
        on_round: Callable[[Proposal, int], None] | None = None,
    ):
        if batch_size < 1:
            raise DeepSpecError(f"batch_size must be >= 1, found {batch_size}")
        self.target = target
        self.tree = tree or Chain()
        check_rule(verify, self.tree)
        if drafter is not None:
            _check_drafter(drafter, self.tree, target)
        self.verify = verify
        self.controller = controller
        if controller:
            controller.reset()
        self.batch_size = batch_size
        self.max_length = min(target.max_length, max_length or target.max_length)
        self.on_round = on_round
        self.session = drafter.session(batch_size) if drafter else None
        self.layers = drafter.layers if drafter else ()
        self.reach = drafter.block_size if drafter else 0
        self.cache = target.cache(batch_size, self)
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
        if size >= self.max_length:
            return f"the prompt has {size} tokens; the cache takes {self.max_length}, an answer included"
        if request.max_new_tokens < 1:
            return f"max_new_tokens must be >= 1, found {request.max_new_tokens}"
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.target.vocab_size:
            return f"the prompt has token ids outside the target's vocabulary of {self.target.vocab_size}"
        if not all(request.stop):
            return "a stop string is empty"
        return None

    def _admit(self, request: Request) -> None:
        """Prefill all of the prompt but its last token, which becomes the anchor."""
        slot = Slot(request, self.target, self.max_length)
        slot.pace = self.controller.pace() if self.controller else None
        row = len(self.slots)
        began = self._clock()
        if self.session:
            self.session.begin(row)
        self.cache.reserve(len(slot.tokens) + slot.limit + MAX_NODES)
        for start in range(self._shared_prefix(slot, row), slot.cached, PREFILL):
            ids = slot.tokens[start : min(start + PREFILL, slot.cached)]
            positions = torch.arange(start, start + len(ids), device=self.target.device)[None]
            step = Step(positions, None, self.cache, [row], [start], [len(ids)], self.layers)
            self.target.forward(torch.tensor([ids], device=self.target.device), step)
            if self.session:
                absorbing = self._clock()
                self.session.extend(row, ids, self._features(step))
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
        if self.session:
            self.session.extend(row, slot.tokens[: lengths[source]], None)
        return lengths[source]

    def _clock(self) -> float:
        """Seconds; on a GPU all that was launched has ended."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    def _round(self) -> None:
        began = self._clock()
        proposals = self._propose()
        drafted = self._clock()
        step, hidden, offsets = self._verify_pass(proposals)
        outcomes = self._outcomes(proposals, hidden, offsets)
        verified = self._clock()
        features = self._features(step)
        for row, (slot, proposal, outcome) in enumerate(zip(self.slots, proposals, outcomes, strict=True)):
            if isinstance(outcome, str):
                slot.error = outcome
            else:
                self._commit(row, slot, proposal, *outcome, features, offsets[row])
        ended = self._clock()
        share = 1 / len(self.slots)
        for slot in self.slots:
            slot.stats.draft_s += (drafted - began) * share
            slot.stats.verify_s += (verified - drafted) * share
            slot.stats.host_s += (ended - verified) * share

    def _propose(self) -> list[Proposal]:
        """One proposal a slot: no path reaches beyond what the request may still commit."""
        proposals = [_NOTHING] * len(self.slots)
        if self.session is None:
            return proposals
        if self.controller:
            self.controller.round(len(self.slots))
        asks = [
            Ask(row, slot.anchor, slot.request.sampling, slot.rng, slot.room - 1, self.tree)
            for row, slot in enumerate(self.slots)
            if slot.room > 1 and (slot.pace is None or slot.pace.drafts())
        ]
        if asks:
            for ask, proposal in zip(asks, self.session.propose(asks), strict=True):
                proposals[ask.row] = proposal
        return self.controller.select(proposals) if self.controller else proposals

    def _verify_pass(self, proposals: list[Proposal]) -> tuple[Step, Tensor, list[int]]:
        """Run the target over every anchor and its tree, end to end in one row.

        Returns the step, h_last [total, d], and where each request's tokens begin in it.
        """
        counts = [1 + len(proposal.tokens) for proposal in proposals]
        starts = [slot.cached for slot in self.slots]
        ids, positions, offsets = [], [], []
        for slot, proposal in zip(self.slots, proposals, strict=True):
            offsets.append(len(ids))
            ids += [slot.anchor, *proposal.tokens]
            positions += [slot.cached + depth for depth in (0, *proposal.depths)]
        # A kernel is made for each new number of tokens; the padding lies behind the last request's own tokens.
        padding = _bucket(len(ids)) - len(ids)
        counts[-1] += padding
        ids += [0] * padding
        positions += [starts[-1]] * padding
        device = self.target.device
        self.cache.reserve(
            max(start + count for start, count in zip(starts, counts, strict=True)) + max(counts)
        )
        chains = all(proposal.is_chain for proposal in proposals)
        visible = None if chains else _tree_mask(proposals, starts, max(counts)).to(device)
        step = Step(
            torch.tensor([positions], device=device),
            visible,
            self.cache,
            None,
            starts,
            counts,
            self.layers,
        )
        hidden = self.target.forward(torch.tensor([ids], device=device), step)
        return step, hidden[0], offsets

    def _outcomes(self, proposals: list[Proposal], hidden: Tensor, offsets: list[int]) -> list[Outcome]:
        samplings = [slot.request.sampling for slot in self.slots]
        logits = self.target.logits(hidden[: offsets[-1] + 1 + len(proposals[-1].tokens)])  # [total, vocab]
        if all(sampling.temperature == 0 for sampling in samplings):
            tokens, highest = best(logits)
            pick = [
                (lambda node, at=offset: tokens[at + 1 + node]) for offset in offsets
            ]  # node -1 is the anchor
            outcomes = [walk(p, choose) for p, choose in zip(proposals, pick, strict=True)]
        else:
            highest = logits.amax(-1)
            outcomes = self._sampled(proposals, logits, offsets, samplings)
        finite = torch.isfinite(highest).tolist()
        return [
            outcome
            if all(finite[offset : offset + 1 + len(p.tokens)])
            else "the target's logits are not finite"
            for outcome, p, offset in zip(outcomes, proposals, offsets, strict=True)
        ]

    def _sampled(
        self, proposals: list[Proposal], logits: Tensor, offsets: list[int], samplings: list[Sampling]
    ) -> list[tuple[list[int], int]]:
        if not any(p.tokens for p in proposals) and len(set(samplings)) == 1:
            tokens = sample(logits, samplings[0], lambda row: self.slots[row].uniform())
            return [([], token) for token in tokens]
        return [
            self._judge(slot, p, logits[offset : offset + 1 + len(p.tokens)])
            for slot, p, offset in zip(self.slots, proposals, offsets, strict=True)
        ]

    def _judge(self, slot: Slot, proposal: Proposal, logits: Tensor) -> tuple[list[int], int]:
        """One request by the rule that fits its proposal. logits [1 + nodes, vocab]; row node + 1 is the node's."""
        sampling = slot.request.sampling
        if sampling.temperature == 0:
            tokens, _ = best(logits)
            return walk(proposal, lambda node: tokens[node + 1])
        if proposal.probs is None:
            return walk(proposal, lambda node: slot.pick(probabilities(logits[node + 1], sampling)))
        laws = probabilities(logits, sampling).cpu()
        return rule_for(proposal, self.verify)(proposal, lambda node: laws[node + 1], slot.uniform, slot.pick)

    def _commit(
        self,
        row: int,
        slot: Slot,
        proposal: Proposal,
        nodes: list[int],
        last: int,
        features: Tensor | None,
        offset: int,
    ) -> None:
        anchor, start = slot.anchor, slot.cached
        accepted = [proposal.tokens[node] for node in nodes]
        kept = slot.commit(accepted, last)
        # A stop inside the draft ends the answer: the rest of the block was never judged.
        slot.stats.drafted.append(
            min(max(proposal.depths, default=0), kept - 1 if kept <= len(accepted) else 1 << 30)
        )
        slot.stats.verified.append(len(proposal.tokens))
        if slot.pace:
            slot.pace.observe(kept)
        if proposal.tokens and self.controller:
            self.controller.observe(proposal, len(nodes))
        if proposal.tokens and self.on_round:
            self.on_round(proposal, len(nodes))
        if slot.finish_reason:
            return
        passed = [0, *(node + 1 for node in nodes)]  # tokens of this pass that are now context
        self.cache.compact(row, start, passed)
        if self.session:
            mine = None if features is None else features[[offset + i for i in passed]]
            self.session.extend(row, [anchor, *accepted], mine)

    def _features(self, step: Step) -> Tensor | None:
        """[total, len(layers)·d]"""
        if not self.layers:
            return None
        return torch.cat([step.features[layer] for layer in self.layers], -1)[0]

    def _finished(self) -> Iterator[Generation]:
        """Take finished requests out; the last slot moves into the gap, so that the batch stays contiguous."""
        for row in reversed(range(len(self.slots))):
            slot = self.slots[row]
            if not (slot.finish_reason or slot.error):
                continue
            last = len(self.slots) - 1
            if row != last:
                self.cache.move(last, row, self.slots[last].cached)
                if self.session:
                    self.session.move(last, row)
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
    tree: Shape | None = None,
    verify: str | None = None,
    stop: str | tuple[str, ...] = (),
    on_tokens: Callable[[list[int], int], None] | None = None,
    controller: Controller | None = None,
    batch_size: int = 64,
) -> list[Generation]:
    """Continue one prompt or a batch of them.

    Args:
        drafter: None decodes plainly, in the same engine.
        prompt_ids: token ids, or a list of such lists (decoded together, at most `batch_size` at once).
        temperature, top_k, top_p, min_p: the sampler; its law is what is preserved.
        seed: of the first prompt; prompt i takes seed + i.
        tree: shape of what is drafted (`decoding.tree`, `decoding.shapes`); None is a chain.
        verify: rule for sampled proposals, None the best one that fits; see `Engine`.
        stop: strings that end an answer; it ends with the token that completes one of them.
        on_tokens: called with (tokens, accepted) after each round of a prompt.
        controller: decides how much is drafted and verified (`decoding.scheduler`).

    Returns:
        A `Generation` for each prompt, in order. Of several prompts, a bad one has finish_reason "error" and says
        why in `error`; the others are as if it were not there.

    Raises:
        DeepSpecError: bad sampler, tree or rule; for a single prompt also an empty or over-long one, ids outside
            the vocabulary, non-finite logits.
    """
    many = bool(prompt_ids) and isinstance(prompt_ids[0], list)
    prompts = prompt_ids if many else [prompt_ids]
    sampling = Sampling(temperature, top_k, top_p, min_p)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    requests = iter(
        [
            Request(ids, max_new_tokens, sampling, seed + i, None, i, on_tokens, stops)
            for i, ids in enumerate(prompts)
        ]
    )
    engine = Engine(target, drafter, min(len(prompts), batch_size), tree, verify, controller)
    done = sorted(engine.run(lambda: next(requests, None)), key=lambda generation: generation.id)
    if not many and done[0].error:
        raise DeepSpecError(done[0].error)
    return done


def _check_drafter(drafter: Drafter, tree: Shape, target: Target) -> None:
    if drafter.vocab_size is not None and drafter.vocab_size != target.vocab_size:
        raise DeepSpecError(
            f"the drafter's vocabulary has {drafter.vocab_size} tokens, the target's {target.vocab_size}"
        )
    if (tree.nodes or 0) > MAX_NODES:
        raise DeepSpecError(f"a tree of {tree.nodes} nodes is too large; a pass takes {MAX_NODES}")


def _common(one: list[int], other: list[int], most: int) -> int:
    """Length of the common beginning, at most `most`."""
    return next((i for i in range(most) if one[i] != other[i]), most)


def _bucket(tokens: int) -> int:
    """The next of the sizes 1 ... 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: four to an octave."""
    step = 1 << max((tokens - 1).bit_length() - 3, 0)
    return -(-tokens // step) * step


def _tree_mask(proposals: list[Proposal], starts: list[int], n: int) -> Tensor:
    """bool [requests, n, max(starts) + n]: each node sees the cached context, the anchor and its own ancestors."""
    visible = torch.zeros(len(proposals), n, max(starts) + n, dtype=torch.bool)
    for row, (proposal, start) in enumerate(zip(proposals, starts, strict=True)):
        visible[row, :, : start + 1] = True
        for node, parent in enumerate(proposal.parents):
            if parent >= 0:
                visible[row, node + 1] = visible[row, parent + 1]
            visible[row, node + 1, start + node + 1] = True
    return visible
