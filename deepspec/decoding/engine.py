"""The engine: rounds of draft, one target pass, verification; many requests at once, refilled as they finish.

A request's last committed token, the anchor, has not been through the target yet. A round drafts a tree below the
anchor, runs the target once over anchor and tree, keeps the path that the rule accepts and one token of the
target's own, and compacts the cache to that path (`Engine._round`). Plain decoding is the round without a draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, settle
from deepspec.decoding.judge import judge
from deepspec.decoding.recorder import Recorder
from deepspec.decoding.request import Generation, Request, Sampling, Stats
from deepspec.decoding.round import Round, RoundClock, Turn, padded_size
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.decoding.slot import Slot
from deepspec.decoding.tree import MAX_NODES
from deepspec.decoding.verify import check_rule
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass, tree_mask
from deepspec.target.model import Target

PREFILL = 512  # prompt tokens a pass, which bounds the attention mask


class Engine:
    """Decodes up to `batch_size` requests at once with one target and one drafter (or none).

    Args:
        tree: the shape that the drafter's laws grow into; None is a chain.
        verify: rule for sampled proposals: "standard" or "block" for chains, "recursive" or "traversal" for
            trees; None takes the best one. Deterministic proposals are always walked.
        controller: decides before each round who drafts, and after it how much is verified; None drafts and
            verifies everything.
        max_length: tokens a request may have, prompt included; None is the target's own limit.
        on_round: called at the end of each round, for each of its requests.
        timed: wait for a GPU at the end of each part of a round, so that the seconds in `Stats` are of that part;
            it costs speed there. On a CPU they always are.
        recorder: keeps the states of every token, where nothing is drafted.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        batch_size: int = 1,
        tree: Shape | None = None,
        verify: str | None = None,
        controller: Controller | None = None,
        max_length: int | None = None,
        on_round: Callable[[Round], None] | None = None,
        timed: bool = False,
        recorder: Recorder | None = None,
    ):
        if batch_size < 1:
            raise DeepSpecError(f"batch_size must be >= 1, found {batch_size}")
        if drafter and recorder:
            raise ValueError("states are recorded where nothing is drafted")
        self.target = target
        self.tree = settle(tree or CHAIN, target, drafter)
        check_rule(verify, self.tree)
        if drafter is not None:
            _check_drafter(drafter, self.tree, target)
        self.verify = verify
        self.controller = controller
        if controller:
            controller.looks_up = drafter is not None and drafter.looks_up
            controller.reset()
        self.batch_size = batch_size
        self.max_length = min(target.max_length, max_length or target.max_length)
        self.on_round = on_round
        self.timed = timed
        self.session = drafter.session(batch_size) if drafter else None
        self.recorder = recorder
        self.layers = drafter.layers if drafter else recorder.layers if recorder else ()
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
        slot.pacer = self.controller.pacer() if self.controller else None
        row = len(self.slots)
        clock = self._clock()
        began = clock.last
        if self.session:
            self.session.begin(row)
        if self.recorder:
            self.recorder.begin(row)
        self.cache.reserve(len(slot.tokens) + slot.limit + MAX_NODES)
        for start in range(self._shared_prefix(slot, row), slot.cached, PREFILL):
            ids = slot.tokens[start : min(start + PREFILL, slot.cached)]
            positions = torch.arange(start, start + len(ids), device=self.target.device)[None]
            run = ForwardPass(
                positions,
                cache=self.cache,
                rows=[row],
                starts=[start],
                counts=[len(ids)],
                wanted=self.layers,
            )
            self.target.forward(torch.tensor([ids], device=self.target.device), run)
            if self.session:
                absorbing = clock.now()
                self.session.extend(row, ids, self._features(run))
                slot.stats.draft_s += clock.now() - absorbing
            if self.recorder:
                self.recorder.prompt(row, cast(Tensor, self._features(run)))
        self.slots.append(slot)
        slot.stats.prefill_s = clock.now() - began - slot.stats.draft_s

    def _shared_prefix(self, slot: Slot, row: int) -> int:
        """Copy the cache of the longest prompt beginning shared with a request in flight; returns its length.

        Templates and system prompts repeat. A drafter that reads features needs every token's pass, unless its session
        can take from another request what it made of them.
        """
        most = slot.cached
        if self.session and self.layers:
            most -= 1  # a token is left for the features of the newest
        lengths = [_common(slot.tokens, other.tokens, min(most, other.cached)) for other in self.slots]
        if not max(lengths, default=0):
            return 0
        source = max(range(len(lengths)), key=lengths.__getitem__)
        shared = slot.tokens[: lengths[source]]
        if self.session and not self.layers:
            self.session.extend(row, shared, None)
        elif self.session and not self.session.share(source, row, shared):
            return 0
        if self.recorder:
            self.recorder.share(source, row, len(shared))
        self.cache.move(source, row, len(shared))
        return len(shared)

    def _clock(self) -> RoundClock:
        return RoundClock(self.target.device, self.timed)

    def _round(self) -> None:
        """One round of all requests in flight.

        1. Draft: the controller says who drafts, the drafter proposes, the controller says how much is verified.
        2. Run the target once over every anchor and its proposal.
        3. Judge: the rule accepts a path of each proposal, and the target's law gives the token after it.
        4. Commit: tokens to the request, the accepted path to the cache, both and the features to the drafter.
        """
        turns = [Turn(row, slot) for row, slot in enumerate(self.slots)]
        # What has ended and waits for the pass of its last token stands behind the others.
        turns.sort(key=lambda turn: turn.slot.finish_reason is not None)
        clock = self._clock()
        if self.session:
            self._draft(turns)
        clock.lap("draft_s")
        run, hidden = self._run_target(turns)
        asked = turns[-1].offset + turns[-1].size
        logits = self.target.logits(hidden[:asked]) if run.logits is None else run.logits[:asked]
        live = [turn for turn in turns if not turn.slot.finish_reason]
        judge(live, logits[: sum(turn.size for turn in live)], self.verify)
        clock.lap("verify_s")
        features = self._features(run)
        if self.recorder and features is not None:
            self.recorder.step([turn.row for turn in turns], features[: len(turns)], logits)
        for turn in live:
            if not turn.slot.error:
                self._commit(turn, features)
        clock.lap("host_s")
        clock.share(turns)
        if self.controller and self.session:
            self.controller.took(clock.parts["draft_s"] + clock.parts["verify_s"])

    def _draft(self, turns: list[Turn]) -> None:
        """One proposal a request: no path reaches beyond what the request may still commit."""
        if self.controller:
            self.controller.round(len(turns), sum(turn.slot.cached for turn in turns) / len(turns))
        drafting = [
            turn
            for turn in turns
            if turn.slot.room > 1 and (turn.slot.pacer is None or turn.slot.pacer.drafts())
        ]
        if drafting and self.session:
            shape = self.controller.shape(self.tree) if self.controller else self.tree
            asks = [
                DraftRequest(
                    row=turn.row,
                    anchor=turn.slot.anchor,
                    sampling=turn.slot.request.sampling,
                    rng=turn.slot.rng,
                    room=turn.slot.room - 1,
                    shape=shape,
                )
                for turn in drafting
            ]
            for turn, proposal in zip(drafting, self.session.propose(asks), strict=True):
                turn.proposal = proposal
        if self.controller:
            selected = self.controller.select([turn.proposal for turn in turns])
            for turn, proposal in zip(turns, selected, strict=True):
                turn.proposal = proposal

    def _run_target(self, turns: list[Turn]) -> tuple[ForwardPass, Tensor]:
        """Run the target over every anchor and its tree, end to end in one row.

        Returns the pass and h_last [total, d].
        """
        starts = [turn.slot.cached for turn in turns]
        counts = [turn.size for turn in turns]
        ids: list[int] = []
        positions: list[int] = []
        for turn in turns:
            turn.offset = len(ids)
            ids += [turn.slot.anchor, *turn.proposal.tokens]
            positions += [turn.slot.cached + depth for depth in (0, *turn.proposal.depths)]
        # torch makes a kernel for each new number of tokens; the padding lies behind the last request's own tokens.
        padding = 0 if self.target.native else padded_size(len(ids)) - len(ids)
        counts[-1] += padding
        ids += [0] * padding
        positions += [starts[-1]] * padding
        device = self.target.device
        self.cache.reserve(
            max(start + count for start, count in zip(starts, counts, strict=True)) + max(counts)
        )
        fed, places = torch.tensor([ids, positions], device=device)[:, None]
        mask = None
        if not all(turn.proposal.is_chain for turn in turns):
            mask = tree_mask([turn.proposal.parents for turn in turns], starts, max(counts)).to(device)
        run = ForwardPass(
            places,
            mask,
            cache=self.cache,
            rows=[turn.row for turn in turns],
            starts=starts,
            counts=counts,
            wanted=self.layers,
            largest=max(positions),
            judged=True,
        )
        hidden = self.target.forward(fed, run)
        for turn in turns:
            turn.fed, turn.passes = run.fed.get(turn.row, 0), run.runs.get(turn.row, 1)
        return run, hidden[0]

    def _commit(self, turn: Turn, features: Tensor | None) -> None:
        """features [total, len(layers)·d] of the pass."""
        slot, proposal, accepted = turn.slot, turn.proposal, len(turn.nodes)
        anchor, start = slot.anchor, slot.cached
        path = [proposal.tokens[node] for node in turn.nodes]
        committed = slot.commit(path, turn.token)
        # Where the path ends, deeper nodes of other branches were never judged.
        drafted_depth = max(proposal.depths, default=0)
        if proposal.judged(turn.nodes) == accepted:
            drafted_depth = accepted
        # A stop inside the draft ends the answer: the rest of the block was never judged.
        ended_inside = committed <= accepted
        judged_depth = min(drafted_depth, committed - 1) if ended_inside else drafted_depth
        slot.stats.drafted.append(judged_depth)
        slot.stats.verified.append(len(proposal.tokens))
        slot.stats.fed.append(turn.fed)
        slot.stats.passes.append(turn.passes)
        if slot.pacer:
            slot.pacer.observe(committed)
        if proposal.tokens and self.controller:
            self.controller.observe(proposal, turn.nodes)
        if self.on_round:
            self.on_round(Round(slot.request.id, proposal, accepted, slot.tokens[-committed:]))
        if slot.finish_reason:
            return
        passed = [0, *(node + 1 for node in turn.nodes)]  # tokens of this pass that are now context
        self.cache.compact(turn.row, start, passed)
        if self.session:
            own = None if features is None else _rows(features, turn.offset, passed)
            self.session.extend(turn.row, [anchor, *path], own)

    def _features(self, run: ForwardPass) -> Tensor | None:
        """[total, len(layers)·d]"""
        if not self.layers:
            return None
        return torch.cat([run.features[layer] for layer in self.layers], -1)[0]

    def _finished(self) -> Iterator[Generation]:
        """Take finished requests out; the last slot moves into the gap, so that the batch stays contiguous."""
        for row in reversed(range(len(self.slots))):
            slot = self.slots[row]
            if not (slot.finish_reason or slot.error):
                continue
            if self.recorder and not self._recorded(row, self.recorder):
                continue
            last = len(self.slots) - 1
            if row != last:
                self.cache.move(last, row, self.slots[last].cached)
                if self.session:
                    self.session.move(last, row)
                if self.recorder:
                    self.recorder.move(last, row)
                self.slots[row] = self.slots[last]
            self.slots.pop()
            yield slot.result()

    def _recorded(self, row: int, recorder: Recorder) -> bool:
        """Close the record of a request that has ended; False: its last token has not been through the target."""
        slot = self.slots[row]
        if slot.error:
            recorder.drop(row)
        elif not recorder.has_all(row, len(slot.tokens)):
            return False
        else:
            recorder.finish(row, slot.request.id)
        return True


def stream(
    target: Target,
    drafter: Drafter | None,
    next_request: Callable[[], Request | None],
    batch_size: int = 1,
    recorder: Recorder | None = None,
) -> Iterator[Generation]:
    """Decode requests as they come, `batch_size` at once; see `Engine`."""
    return Engine(target, drafter, batch_size=batch_size, recorder=recorder).run(next_request)


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
    timed: bool = False,
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
        timed: see `Engine`.

    Returns:
        A `Generation` for each prompt, in order. Of several prompts, a bad one has finish_reason "error" and says
        why in `error`; the others are as if it were not there.

    Raises:
        DeepSpecError: bad sampler, tree or rule; for a single prompt also an empty or over-long one, ids outside
            the vocabulary, non-finite logits.
    """
    many = bool(prompt_ids) and isinstance(prompt_ids[0], list)
    prompts = cast("list[list[int]]", prompt_ids if many else [prompt_ids])  # `many` told which
    sampling = Sampling(temperature, top_k, top_p, min_p)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    requests = iter(
        [
            Request(
                ids,
                max_new_tokens,
                sampling=sampling,
                seed=seed + i,
                id=i,
                on_tokens=on_tokens,
                stop=stops,
            )
            for i, ids in enumerate(prompts)
        ]
    )
    engine = Engine(
        target,
        drafter,
        batch_size=min(len(prompts), batch_size),
        tree=tree,
        verify=verify,
        controller=controller,
        timed=timed,
    )
    done = sorted(engine.run(lambda: next(requests, None)), key=lambda generation: generation.id)
    if not many and done[0].error:
        raise DeepSpecError(done[0].error)
    return done


def _check_drafter(drafter: Drafter, tree: Shape, target: Target) -> None:
    if drafter.vocab_size is not None and drafter.vocab_size != target.vocab_size:
        raise DeepSpecError(
            f"the drafter's vocabulary has {drafter.vocab_size} tokens, the target's {target.vocab_size}"
        )
    if not target.verdict.trees and tree.draws != "chain":
        raise DeepSpecError(
            f"{target.source}: this target verifies chains, not trees: {target.verdict.reason or target.verdict.body}"
        )
    if (tree.nodes or 0) > MAX_NODES:
        raise DeepSpecError(f"a tree of {tree.nodes} nodes is too large; a pass takes {MAX_NODES}")


def _rows(features: Tensor, first: int, kept: list[int]) -> Tensor:
    """Return the rows first + kept[i] of features; of a chain they stand side by side."""
    if kept == list(range(len(kept))):
        return features[first : first + len(kept)]
    return features[[first + i for i in kept]]


def _common(one: list[int], other: list[int], most: int) -> int:
    """Length of the common beginning, at most `most`."""
    return next((i for i in range(most) if one[i] != other[i]), most)
