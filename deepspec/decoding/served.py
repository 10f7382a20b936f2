"""A target that vLLM runs: requests of token ids to one server or several, and exact token ids back.

Nothing is tokenised on the way. Every request goes to the server with the fewest in flight; one that fails is sent
again, to another server where there is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx

from deepspec.decoding.request import Generation, Request, Stats
from deepspec.errors import DeepSpecError
from deepspec.retrying import KEY_VARIABLE, explain, key_header, wait_s, worth_retrying

MODELS, COMPLETIONS = "/v1/models", "/v1/completions"
Stream = Callable[[Callable[[], Request | None]], Iterator[Generation]]  # next request → what is finished


class RefusedError(Exception):
    """A server refuses this request, and would refuse it again."""


class Servers:
    """Running vLLM servers of one target.

    Args:
        addresses: like http://host:8000, with /v1 or without.
        concurrency: requests in flight at each.
        retries: of a request that fails.
        folder: where they write hidden states, as this machine sees it; None: they are not asked for any.

    Raises:
        DeepSpecError: no server there, or an address that is none.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        concurrency: int = 64,
        retries: int = 5,
        timeout_s: float = 600.0,
        folder: Path | None = None,
    ):
        self.concurrency, self.retries, self.folder = concurrency, retries, folder
        # No connection is used twice: a server may close an idle one at the moment it is taken again.
        once = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.Client(headers=key_header(), timeout=timeout_s, trust_env=False, limits=once)
        self._lock = threading.Lock()
        self._in_flight = {_root(address): 0 for address in addresses}
        self._models = {address: self._model(address) for address in self._in_flight}
        self._dead: dict[str, str] = {}  # address → why

    @property
    def room(self) -> int:
        """Return how many requests may be in flight."""
        return self.concurrency * len(self._in_flight)

    def stream(
        self, stop_ids: frozenset[int], next_request: Callable[[], Request | None]
    ) -> Iterator[Generation]:
        """Decode requests as they come, as many at once as the servers take; see `decoding.engine.stream`.

        Args:
            stop_ids: of requests that have none of their own.

        Raises:
            DeepSpecError: no server answers any more.
        """
        waiting: dict[Future[Generation], Request] = {}
        with ThreadPoolExecutor(self.room, "requests") as pool:
            try:
                while True:
                    while len(waiting) < self.room and (request := next_request()) is not None:
                        waiting[pool.submit(self.decode, request, stop_ids)] = request
                    if not waiting:
                        return
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        del waiting[future]
                        yield future.result()
            finally:
                for future in waiting:
                    future.cancel()

    def decode(self, request: Request, stop_ids: frozenset[int]) -> Generation:
        """Decode one request.

        Raises:
            DeepSpecError: no server answers any more, or a reply that is not vLLM's.
        """
        stops = stop_ids if request.stop_ids is None else request.stop_ids
        sampling = request.sampling
        body = {
            "prompt": request.prompt_ids,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": request.seed,
            "stop_token_ids": sorted(stops),
        }
        try:
            choice, _ = self.complete(body)
        except RefusedError as error:
            return Generation(request.id, request.prompt_ids, [], "error", Stats(), str(error))
        tokens, reason, stop = choice["token_ids"], choice.get("finish_reason"), choice.get("stop_reason")
        if reason == "stop" and stop in stops and tokens[-1:] != [stop]:
            tokens = [*tokens, stop]
        if request.on_tokens:
            request.on_tokens(tokens, 0)
        return Generation(request.id, request.prompt_ids, tokens, str(reason), Stats())

    def complete(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Post a completion of token ids; return its choice, with `token_ids`, and the whole reply.

        Raises:
            RefusedError: this request is refused.
            DeepSpecError: no server answers any more, or a reply that is not vLLM's.
        """
        said = ""
        for attempt in range(self.retries + 1):
            address = self._take(said)
            response = error = None
            try:
                asked = {"model": self._models[address], "return_token_ids": True}
                response = self.http.post(address + COMPLETIONS, json=body | asked)
            except httpx.RequestError as raised:
                error = raised
            finally:
                self._give_back(address, error)
            if response is not None and not worth_retrying(response):
                return self._choice(address, response, body["prompt"])
            said = f"status {response.status_code}" if response is not None else explain(error)
            if attempt < self.retries and len(self._dead) < len(self._in_flight):
                time.sleep(wait_s(attempt, response))
        self._take(said)
        raise RefusedError(f"no answer from vLLM in {self.retries + 1} tries: {said}")

    def _take(self, said: str) -> str:
        """Return the living server with the fewest requests in flight, one more from now on."""
        with self._lock:
            alive = {a: n for a, n in self._in_flight.items() if a not in self._dead}
            if not alive:
                why = "; ".join(f"{address} ({reason})" for address, reason in self._dead.items())
                raise DeepSpecError(
                    f"vLLM no longer answers: {why or said}; run again: what is finished is kept"
                )
            address = min(alive, key=alive.__getitem__)
            self._in_flight[address] += 1
            return address

    def _give_back(self, address: str, error: httpx.RequestError | None) -> None:
        with self._lock:
            self._in_flight[address] -= 1
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                self._dead[address] = explain(error)

    def _choice(
        self, address: str, response: httpx.Response, prompt: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        words = " ".join(response.text.split())[:200]
        if response.status_code in (400, 413, 422):
            raise RefusedError(f"vLLM refused the request (status {response.status_code}): {words}")
        if not response.is_success:
            hint = f"; is ${KEY_VARIABLE} set?" if response.status_code in (401, 403) else ""
            raise DeepSpecError(f"{address}: vLLM answered with status {response.status_code}{hint}: {words}")
        try:
            reply = response.json()
            choice = reply["choices"][0]
            tokens, asked = (
                choice["token_ids"],
                choice.get("prompt_token_ids") or reply.get("prompt_token_ids"),
            )
        except (ValueError, KeyError, IndexError, TypeError):
            tokens = asked = None
        if not isinstance(tokens, list):
            raise DeepSpecError(f"{address}: its replies have no token ids; vLLM returns them from 0.10.2 on")
        if asked is not None and asked != prompt:
            raise DeepSpecError(f"{address}: it answered another prompt than it was asked")
        return choice, reply

    def _model(self, address: str) -> str:
        """Return the name under which a server serves its model."""
        try:
            response = self.http.get(address + MODELS)
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            why = explain(error) if isinstance(error, httpx.HTTPError) else f"{MODELS} names no model"
            raise DeepSpecError(f"{address}: no vLLM server answers: {why}") from None


def _root(address: str) -> str:
    try:
        url = httpx.URL(address.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise DeepSpecError(f"target.vllm.base_urls: {address!r} is not an address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise DeepSpecError(
            f"target.vllm.base_urls: {address!r} is not an address like http://localhost:8000"
        )
    return str(url).rstrip("/")
