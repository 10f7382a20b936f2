"""How engines are asked and what they tell of their drafts, over HTTP: vLLM, SGLang, TGI (and `llamacpp/client.py`).

Each client decodes one prompt greedily and returns an `Answer` with the engine's own counts of that request: of the
counters that only grow (vLLM, TGI) the difference before and after, so the server must serve nobody else meanwhile.

vLLM    /v1/completions takes and returns token ids; /metrics counts drafts, and the seconds from the first token to
        the last.
SGLang  /generate takes token ids; its `meta_info` counts the request's verifications.
TGI     /generate takes text alone: the ids that it made of it are asked back and compared. Its metrics count the
        tokens that a pass gained (`tgi_request_skipped_tokens`), the prompt's pass included, without their positions.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deepspec.errors import DeepSpecError

TIMEOUT_S = 600
SLACK = 64  # tokens of the context behind an answer's end, for drafts


@dataclass(frozen=True)
class Counts:
    """Counts of the verifications that had a draft.

    `by_position[i]`: in how many of them draft token i + 1 was accepted (empty where the engine does not say).
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: tuple[int, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        both = zip_longest(self.by_position, other.by_position, fillvalue=0)
        return Counts(
            self.drafts + other.drafts,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            tuple(a + b for a, b in both),
        )

    def __neg__(self) -> Counts:
        return Counts(-self.drafts, -self.drafted, -self.accepted, tuple(-n for n in self.by_position))

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens a verification, the target's own included."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def accept_rate_by_position(self) -> list[float | None]:
        """Return the acceptance rate of each position, of the drafts in which all earlier ones were accepted."""
        before = (self.drafts, *self.by_position)
        return [now / was if was else None for was, now in zip(before, self.by_position, strict=False)]


@dataclass(frozen=True)
class Prompt:
    """`text` is the rendered template, `ids` its tokens."""

    task: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Turn:
    """A verification, or a pass without a draft: `accepted` of `drafted` tokens in `seconds`."""

    drafted: int
    accepted: int
    seconds: float


@dataclass(frozen=True)
class Answer:
    """A continuation. `seconds` were spent on `timed_tokens` of it; `turns` where the engine tells them."""

    tokens: list[int]
    seconds: float
    timed_tokens: int
    counts: Counts = Counts()
    turns: tuple[Turn, ...] = ()


class Client(ABC):
    """One engine at one address."""

    engine: ClassVar[str]
    timing: ClassVar[str]  # what `Answer.seconds` are

    def __init__(self, url: str, stop_ids: Sequence[int] = ()):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.stop_ids = sorted(stop_ids)
        # No connection is used twice: a server may close an idle one at the moment it is taken again.
        once = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(timeout=TIMEOUT_S, trust_env=False, limits=once)

    @abstractmethod
    def version(self) -> str | None:
        """Return the engine's version; raise where nobody or another engine answers."""

    @abstractmethod
    def answer(self, prompt: Prompt, tokens: int, drafting: bool) -> Answer:
        """At most so many tokens, greedily; `drafting`: the counts of drafts must be there."""

    def _get(self, path: str) -> httpx.Response:
        return self._checked("GET", path)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._json(self._checked("POST", path, json=body), path)

    def _checked(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self.http.request(method, self.url + path, **options)
        except httpx.HTTPError as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise DeepSpecError(f"{self.url}: no answer from {self.engine}: {why}") from None
        except httpx.InvalidURL as error:
            raise DeepSpecError(
                f"{self.url!r} is not an address like http://localhost:8000: {error}"
            ) from None
        if response.status_code == 404:
            raise DeepSpecError(f"{self.url}{path}: no such page; is {self.engine} served there?")
        if not response.is_success:
            said = " ".join(response.text.split())[:200]
            raise DeepSpecError(
                f"{self.url}{path}: {self.engine} refused (status {response.status_code}): {said}"
            )
        return response

    def _json(self, response: httpx.Response, path: str) -> dict[str, Any]:
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DeepSpecError(f"{self.url}{path}: the reply is not {self.engine}'s: {response.text[:80]!r}")
        return found

    def _field(self, reply: Any, *path: str | int) -> Any:
        """Return a member of a reply, by its path."""
        for step in path:
            try:
                reply = reply[step]
            except (KeyError, IndexError, TypeError):
                where = ".".join(map(str, path))
                raise DeepSpecError(f"{self.url}: {self.engine}'s reply has no {where}") from None
        return reply


class VLLM(Client):
    engine, timing = "vllm", "from the first token to the last"
    _DECODE = "vllm:request_decode_time_seconds"
    _SPEC = "vllm:spec_decode_num_"

    def version(self) -> str | None:
        return self._json(self._get("/version"), "/version").get("version")

    def model(self) -> str:
        """Return the served model's name."""
        return self._field(self._json(self._get("/v1/models"), "/v1/models"), "data", 0, "id")

    def answer(self, prompt: Prompt, tokens: int, drafting: bool) -> Answer:
        return self.decode(prompt.ids, tokens, drafting)

    def decode(
        self, ids: list[int], tokens: int, drafting: bool, temperature: float = 0.0, seed: int = 0
    ) -> Answer:
        """Decode one prompt as `answer` does, at any temperature."""
        before = self._get("/metrics").text
        body = {"prompt": ids, "max_tokens": tokens, "stop_token_ids": self.stop_ids}
        body |= {"temperature": temperature, "seed": seed, "repetition_penalty": 1.0}
        body |= {"model": self.model(), "return_token_ids": True}
        reply = self._post("/v1/completions", body)
        made = self._field(reply, "choices", 0, "token_ids")
        after = self._metrics_after(before)
        seconds = total(after, f"{self._DECODE}_sum") - total(before, f"{self._DECODE}_sum")
        counts = self._counts(after) + -self._counts(before) if drafting else Counts()
        return Answer(made, seconds, len(made) - 1, counts)

    def top_two_gap(self, ids: list[int]) -> float:
        """Return the difference of the log-probabilities of the two likeliest tokens after `ids`."""
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 2, "model": self.model()}
        reply = self._post("/v1/completions", body)
        best, second = sorted(self._field(reply, "choices", 0, "logprobs", "top_logprobs", 0).values())[
            -1:-3:-1
        ]
        return best - second

    def _counts(self, text: str) -> Counts:
        found = [
            total(text, f"{self._SPEC}{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")
        ]
        if not samples(text, f"{self._SPEC}drafts_total"):
            raise DeepSpecError(
                f"{self.url}: vLLM's metrics have no {self._SPEC}drafts: it serves without a draft; "
                "start it with --speculative-config"
            )
        places: dict[int, float] = {}
        for labels, value in samples(text, f"{self._SPEC}accepted_tokens_per_pos_total"):
            place = int(labels.get("position", 0))
            places[place] = places.get(place, 0) + value
        drafts, drafted, accepted = map(int, found)
        return Counts(drafts, drafted, accepted, tuple(int(places[place]) for place in sorted(places)))

    def _metrics_after(self, before: str) -> str:
        """Return the metrics once they count the request: they may lag behind its reply."""
        for _ in range(100):
            text = self._get("/metrics").text
            if total(text, f"{self._DECODE}_count") > total(before, f"{self._DECODE}_count"):
                return text
            time.sleep(0.05)
        raise DeepSpecError(
            f"{self.url}: vLLM's metrics do not count requests; start it without --disable-log-stats"
        )


class SGLang(Client):
    engine, timing = "sglang", "of the whole request"

    def version(self) -> str | None:
        try:
            reply = self._get("/get_server_info")
        except DeepSpecError:
            reply = self._get("/server_info")  # its later name
        return self._json(reply, "/server_info").get("version")

    def answer(self, prompt: Prompt, tokens: int, drafting: bool) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "stop_token_ids": self.stop_ids}
        reply = self._post("/generate", {"input_ids": prompt.ids, "sampling_params": sampling})
        made, meta = self._field(reply, "output_ids"), self._field(reply, "meta_info")
        counts = self._counts(meta) if drafting and len(made) > 1 else Counts()
        return Answer(made, self._field(meta, "e2e_latency"), len(made), counts)

    def _counts(self, meta: dict[str, Any]) -> Counts:
        if "spec_verify_ct" not in meta:
            raise DeepSpecError(
                f"{self.url}: SGLang's reply counts no verifications (spec_verify_ct): it serves without a draft; "
                "start it with --speculative-algorithm"
            )
        exactly = _first(meta, "spec_correct_drafts_histogram", "spec_accept_histogram") or []
        accepted = _first(meta, "spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
        drafted = _first(meta, "spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
        verified = meta["spec_verify_ct"]
        if accepted is None:  # older servers; the first token is the prompt's
            accepted = max(self._field(meta, "completion_tokens") - 1 - verified, 0)
        by_position = tuple(sum(exactly[i:]) for i in range(1, len(exactly)))
        return Counts(verified, drafted or 0, accepted, by_position)


class TGI(Client):
    engine, timing = "tgi", "of the whole request"
    _GAINED = "tgi_request_skipped_tokens"

    def version(self) -> str | None:
        return self._json(self._get("/info"), "/info").get("version")

    def answer(self, prompt: Prompt, tokens: int, drafting: bool) -> Answer:
        before = self._get("/metrics").text
        parameters = {
            "max_new_tokens": tokens,
            "do_sample": False,
            "details": True,
            "decoder_input_details": True,
        }
        response = self._checked("POST", "/generate", json={"inputs": prompt.text, "parameters": parameters})
        reply = self._json(response, "/generate")
        read = [token.get("id") for token in self._field(reply, "details", "prefill")]
        if read != prompt.ids:
            raise DeepSpecError(
                f"{self.url}: TGI reads the prompt as {len(read)} tokens and the target as {len(prompt.ids)}: another "
                "tokenizer, or a beginning of text that is added twice"
            )
        made = [self._field(token, "id") for token in self._field(reply, "details", "tokens")]
        seconds = float(response.headers.get("x-inference-time", "nan")) / 1000
        counts = self._counts(before) if drafting else Counts()
        return Answer(made, seconds, len(made), counts)

    def _counts(self, before: str) -> Counts:
        """Count its passes less the prompt's own. TGI does not say how many tokens were drafted, nor where."""
        after = self._get("/metrics").text
        passes, gained = (
            total(after, f"{self._GAINED}_{part}") - total(before, f"{self._GAINED}_{part}")
            for part in ("count", "sum")
        )
        if not passes:
            raise DeepSpecError(
                f"{self.url}: TGI's metrics have no {self._GAINED}; start it with --speculate"
            )
        return Counts(int(passes) - 1, 0, int(gained))


def samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Return labels and values of a metric in Prometheus' text format."""
    families = text_string_to_metric_families(text)
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def total(text: str, name: str) -> float:
    """Return a metric's sum over all its labels; 0 where there is none."""
    return sum(value for _, value in samples(text, name))


def _first(meta: dict[str, Any], *names: str) -> Any:
    """Return the first of the names that a version of the engine uses."""
    return next((meta[name] for name in names if meta.get(name) is not None), None)
