"""Magpie (arXiv 2406.08464): the target, given its own template up to the user's turn, writes that turn.

Every attempt has an index and a seed of its own and is appended to a work file as soon as it ends, so a
killed run continues where it stopped. Attempts are handed out in the order of their index, whichever ended
first: the chosen prompts depend neither on the batch nor on interruptions.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.files import digest
from deepspec.journal import Journal, read_entry, read_journal
from deepspec.messages.prompt import Chat
from deepspec.messages.sources import Candidate
from deepspec.progress import Progress
from deepspec.prompts.filters import Judged, Sieve
from deepspec.prompts.params import MagpieParams

if TYPE_CHECKING:
    from deepspec.decoding.served import Stream

ATTEMPTS_PER_PROMPT = 4  # A target that fails more often than this cannot write its own prompts.


class Magpie:
    """Prompts that the target wrote.

    Args:
        target: has `tokenizer`, `stop_ids`, `digest` and `user_prefix_ids()`.
        batch_size: attempts decoded at once; does not change which prompts come out.
        work_dir: where the work file lies; one file per target, settings and seed.
        decode: decodes the attempts in the place of our own engine.
    """

    def __init__(
        self,
        target: Any,
        params: MagpieParams,
        seed: int,
        batch_size: int,
        work_dir: Path,
        decode: Stream | None = None,
    ) -> None:
        self._target = target
        self._params = params
        self._seed = seed
        self._batch_size = batch_size
        self._decode = decode
        settings = json.dumps(
            [params.model_dump(), target.digest, seed, *(["served"] if decode else [])], sort_keys=True
        )
        self._work = work_dir / f"{digest(settings)}.jsonl"
        self._done: dict[int, int | None] = {}  # attempt → where its line begins; None: it failed
        for offset, row in read_journal(self._work):
            self._done[row["index"]] = offset
        self._next = 0  # the first attempt not yet handed out

    def offers(self, need: int, sieve: Sieve) -> Iterator[Judged]:
        """Yield attempts in order; missing ones are generated until `need` pass the sieve or the budget is spent."""
        end = self._next + ATTEMPTS_PER_PROMPT * need
        self._generate(end, need, sieve)
        while self._next < end and self._next in self._done:
            self._next += 1
            yield self._judged(self._next - 1, sieve)

    def _generate(self, end: int, need: int, sieve: Sieve) -> None:
        """Make missing attempts below `end`: first those that an interrupted run left out, then new ones."""
        known = max(self._done, default=-1)
        missing = deque(index for index in range(self._next, end) if index not in self._done)
        passed: set[bytes] = set()  # duplicate keys, so that a prompt written twice counts once

        def enough() -> bool:
            return not missing or (len(passed) >= need and missing[0] > known)

        def next_request() -> Request | None:
            return None if enough() else self._request(missing.popleft())

        def count(index: int) -> None:
            judged = self._judged(index, sieve)
            if sieve.fault(judged) is None:
                passed.add(judged.key)

        for index in range(self._next, end):
            if index in self._done:
                count(index)
        if enough():
            return
        with Progress("magpie", need, done=min(len(passed), need)) as progress:
            for generation in self._attempts(next_request):
                count(int(generation.id))
                progress.tokens(len(generation.tokens))
                progress.advance(min(len(passed), need) - progress.done)

    def _attempts(self, next_request: Callable[[], Request | None]) -> Iterator[Generation]:
        """Decode, and keep every attempt in the work file before it is used."""
        decode = self._decode
        if decode is None:
            from deepspec.decoding.engine import stream  # here, so that other sources work without torch

            decode = partial(stream, self._target, None, batch_size=self._batch_size)
        with Journal(self._work) as work:
            for generation in decode(next_request):
                self._record(generation, work)
                yield generation

    def _request(self, index: int) -> Request:
        return Request(
            prompt_ids=self._target.user_prefix_ids(),
            max_new_tokens=self._params.max_new_tokens,
            sampling=Sampling(temperature=self._params.temperature, top_p=self._params.top_p),
            seed=(self._seed * 1_000_003 + index) % 2**63,
            id=index,
        )

    def _record(self, generation: Generation, work: Journal) -> None:
        """Keep an attempt in the work file; one that failed is left to the next run."""
        tokens = [token for token in generation.tokens if token not in self._target.stop_ids]
        text = self._target.tokenizer.decode(tokens, skip_special_tokens=False).strip()
        row = {"index": generation.id, "text": text, "finish_reason": generation.finish_reason}
        failed = generation.finish_reason == "error"
        self._done[generation.id] = None if failed else work.append(row)

    def _judged(self, index: int, sieve: Sieve) -> Judged:
        offset = self._done[index]
        if offset is None:
            return sieve.judge("magpie", Candidate(Chat(), fault="failed"))
        row = read_entry(self._work, offset)
        fault = None if row["finish_reason"] == "stop" else "unfinished"
        return sieve.judge("magpie", Candidate(Chat.of_turns([row["text"]]), fault=fault))
