"""How a llama-server is asked: /completion takes token ids and tells with each token the time and the drafts so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.serving.protocols import Answer, Client, Counts, Prompt, Turn


class LlamaCpp(Client):
    """Asks for `beyond` more tokens than are wanted, since llama.cpp drafts fewer where an answer is about to end."""

    engine, timing = "llamacpp", "from the first token to the last"
    beyond = 16

    def version(self) -> str | None:
        return self._field(self._json(self._get("/props"), "/props"), "build_info")

    def answer(self, prompt: Prompt, tokens: int, drafting: bool) -> Answer:
        body = {**_GREEDY, "prompt": prompt.ids, "n_predict": tokens + self.beyond}
        told = self._stream(body)
        events = [self._field(event, "timings") for event in told]
        made = [token for event in told for token in self._field(event, "tokens")]
        if len(made) < events[-1]["predicted_n"]:  # part of a character: such tokens are not told one by one
            made = self._field(self._post("/completion", body | {"stream": False}), "tokens")
        made = self._until_stop(made)
        if drafting and len(made) > self.beyond and "draft_n" not in events[-1]:
            raise DeepSpecError(f"{self.url}: llama.cpp's reply counts no drafts; start it with --spec-type")
        counted = _needed(_turns(events), min(tokens, len(made)) - 1)
        seconds, committed = sum(turn.seconds for turn in counted), sum(turn.accepted + 1 for turn in counted)
        return Answer(made[:tokens], seconds, committed, turn_counts(counted), tuple(counted))

    def turns(self, prompt: Prompt, tokens: int) -> list[Turn]:
        """Return the turns that write so many tokens, whatever they are: none of them ends the answer."""
        told = self._stream({**_GREEDY, "prompt": prompt.ids, "n_predict": tokens, "ignore_eos": True})
        return _turns([self._field(event, "timings") for event in told])

    def sample(self, prompt: Prompt, tokens: int, seed: int, temperature: float = 1.0) -> list[int]:
        """Return a continuation drawn from the whole law."""
        body = {
            **_GREEDY,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": seed,
            "stream": False,
        }
        reply = self._post(
            "/completion", body | {"prompt": prompt.ids, "n_predict": tokens, "cache_prompt": True}
        )
        return self._until_stop(self._field(reply, "tokens"))

    def greedy(self, ids: list[int], tokens: int) -> tuple[list[int], int]:
        """Return at most so many tokens and how many passes of the target gave them, without being told of each one."""
        body = {**_GREEDY, "stream": False, "timings_per_token": False, "prompt": ids, "n_predict": tokens}
        reply = self._post("/completion", body)
        made, timings = self._field(reply, "tokens"), self._field(reply, "timings")
        return self._until_stop(made), timings["predicted_n"] - (timings.get("draft_n_accepted") or 0)

    def _until_stop(self, tokens: list[int]) -> list[int]:
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        return tokens if stop is None else tokens[: stop + 1]

    def _stream(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        text = self._checked("POST", "/completion", json=body).text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        found = [json.loads(line) for line in lines if line.startswith("{")]
        if not found:
            raise DeepSpecError(f"{self.url}/completion: the reply is not llama.cpp's: {text[:80]!r}")
        return found


_GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "samplers": ["temperature"],
    "repeat_penalty": 1.0,
    "cache_prompt": False,
    "return_tokens": True,
    "timings_per_token": True,
    "stream": True,
}


def turn_counts(turns: Sequence[Turn]) -> Counts:
    """Return the counts of the turns that had a draft."""
    drafted = [turn for turn in turns if turn.drafted]
    longest = max((turn.drafted for turn in drafted), default=0)
    by_position = tuple(sum(turn.accepted > i for turn in drafted) for i in range(longest))
    tokens, accepted = sum(turn.drafted for turn in drafted), sum(turn.accepted for turn in drafted)
    return Counts(len(drafted), tokens, accepted, by_position)


def _needed(turns: Sequence[Turn], tokens: int) -> list[Turn]:
    """Return the turns up to the one that writes the last of so many tokens."""
    found: list[Turn] = []
    for turn in turns:
        if tokens <= 0:
            break
        tokens -= turn.accepted + 1
        found.append(turn)
    return found


def _turns(events: Sequence[dict[str, Any]]) -> list[Turn]:
    """Tell turns by llama.cpp's timings with each token: those of one turn have seen as many drafted tokens.

    The first token is of the prompt's pass. A turn without a draft writes one token.
    """
    found: list[Turn] = []
    drafted = accepted = end = 0  # `end`: tokens written when the last turn with a draft was done
    clock = events[0]["predicted_ms"] if events else 0.0
    for before, event in pairwise(events):
        now, seen, n = event["predicted_ms"], event.get("draft_n") or 0, event["predicted_n"]
        if n == before["predicted_n"]:  # the last event repeats the last token's
            continue
        if seen > drafted:
            stood = event["draft_n_accepted"] - accepted
            found.append(Turn(seen - drafted, stood, (now - clock) / 1000))
            drafted, accepted, end = seen, accepted + stood, n + stood
        elif n > end:
            found.append(Turn(0, 0, (now - clock) / 1000))
        clock = now
    return found
