"""Answers from servers that speak the OpenAI chat API (vLLM, SGLang, TGI, llama.cpp, ...).

A server that returns token ids (`return_token_ids`, vLLM) is believed to the token, if its ids of the prompt are those
of our rendering. From others comes text: an answer's ids are those of its text under the target's own tokenizer,
and the stop token is appended where the server says that the answer ended by itself. These can differ from the ids that
were sampled (a model can spell a word in several ways); an answer whose ids do not decode to the same text is
recorded as a failure. Thoughts and tool calls that a parser took out of the text are put back as the template writes
them. What the request does not say, a server may take from the model's generation_config (vLLM does, unless started
with `--generation-config vllm`). The local engine has none of these flaws.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.history import Histories
from deepspec.answers.params import GenerateParams
from deepspec.answers.reply import Reader
from deepspec.answers.shards import Sink
from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt
from deepspec.retrying import KEY_VARIABLE, explain, key_header, wait_s, worth_retrying
from deepspec.target.chat import with_named_thoughts, with_text_arguments


class _UnreachableError(Exception):
    """Nobody listens at this address."""


@dataclass
class _Job:
    """A conversation that is not finished, opened or still to be opened."""

    prompt: Prompt
    conversation: Conversation | None = None


def answer(target: Any, prompts: Sequence[Prompt], params: GenerateParams, sink: Sink) -> None:
    """Answer all prompts, with at most `openai.concurrency` requests in flight at each address.

    Raises:
        DeepSpecError: the settings name no server, a server refuses us (key, model), or none can be reached.
    """
    endpoints = [_endpoint(url) for url in params.openai.base_urls]
    if not endpoints:
        raise DeepSpecError(
            "generate.openai.base_urls is empty; name at least one server, or use engine: local"
        )
    if not params.openai.model:
        raise DeepSpecError(
            "generate.openai.model is empty; set it to the model name that the server expects"
        )
    asyncio.run(_Run(target, params, sink).run(endpoints, prompts))


class _Run:
    """Queue of conversations, and `concurrency` workers for each address."""

    def __init__(self, target: Any, params: GenerateParams, sink: Sink) -> None:
        self.target, self.params, self.sink = target, params, sink
        self.histories = Histories(target)
        self.reader = Reader(target, self.histories)
        self.textual: set[str] = set()  # addresses that refuse to be asked for token ids
        self.prompts: Sequence[Prompt] = ()
        self.waiting: deque[int | _Job] = deque()  # a number is a prompt that was never asked
        self.dead: dict[str, str] = {}  # address → why

    async def run(self, endpoints: list[str], prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.waiting.extend(range(len(prompts)))
        workers = self.params.openai.concurrency
        async with httpx.AsyncClient(
            headers=key_header(),
            timeout=self.params.openai.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=workers * len(endpoints)),
        ) as client:
            while self.waiting:
                alive = [endpoint for endpoint in endpoints if endpoint not in self.dead]
                if not alive:
                    raise DeepSpecError(self._no_server())
                await _together([self._work(client, endpoint) for endpoint in alive for _ in range(workers)])

    async def _work(self, client: httpx.AsyncClient, endpoint: str) -> None:
        while self.waiting and endpoint not in self.dead:
            taken = self.waiting.popleft()
            job = taken if isinstance(taken, _Job) else _Job(self.prompts[taken])
            try:
                await self._converse(client, endpoint, job)
            except _UnreachableError as error:
                self.dead[endpoint] = str(error)
                self.waiting.appendleft(job)
            except UnusableError as error:
                self.sink.failed(job.prompt.id, str(error))

    async def _converse(self, client: httpx.AsyncClient, endpoint: str, job: _Job) -> None:
        if job.conversation is None:
            params = self.params
            job.conversation = Conversation(
                self.target,
                job.prompt,
                params.max_new_tokens,
                params.max_length,
                self.histories,
                rendered=True,
            )
        while job.conversation.prompt_ids is not None:
            reply = await self._ask(client, endpoint, job.conversation)
            tokens, finish_reason, message = self.reader.read(reply, job.conversation)
            job.conversation.add_answer(tokens, finish_reason, message)
            self.sink.progress.tokens(len(tokens))
        self.sink.finished(job.conversation)

    async def _ask(
        self, client: httpx.AsyncClient, endpoint: str, conversation: Conversation
    ) -> dict[str, Any]:
        """Post the conversation; once more without asking for token ids where a server does not know of them."""
        body = self._body(conversation)
        if endpoint not in self.textual:
            try:
                return await self._post(client, endpoint, body | {"return_token_ids": True})
            except UnusableError as error:
                if "return_token_ids" not in str(error):
                    raise
            self.textual.add(endpoint)
        return await self._post(client, endpoint, body)

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        chat = conversation.prompt.chat
        options = {**self.target.chat_template_kwargs, **chat.chat_template_kwargs}
        body = {
            "model": self.params.openai.model,
            "messages": with_text_arguments(with_named_thoughts(conversation.asked)),
            "max_tokens": conversation.room,
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "seed": self.sink.seed(conversation),
        }
        if chat.tools:
            body["tools"] = list(chat.tools)
        # Not part of OpenAI's own API, which refuses them; the engines above take them.
        if options:
            body["chat_template_kwargs"] = options
        return body | ({"top_k": self.params.top_k} if self.params.top_k else {})

    async def _post(self, client: httpx.AsyncClient, endpoint: str, body: dict) -> dict:
        """Post a request and return the server's reply; wait and try again where that can help."""
        retries = self.params.openai.retries
        for attempt in range(retries + 1):
            response = error = None
            try:
                response = await client.post(endpoint, json=body)
            except httpx.RequestError as raised:
                error = raised
            if response is not None and not worth_retrying(response):
                return _parsed(response, endpoint)
            if attempt < retries:
                await asyncio.sleep(wait_s(attempt, response))
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise _UnreachableError(explain(error))
        what = f"status {response.status_code}" if response is not None else explain(error)
        raise UnusableError(f"{endpoint} gave no answer in {retries + 1} tries: {what}")

    def _no_server(self) -> str:
        tried = "; ".join(f"{endpoint} ({why})" for endpoint, why in self.dead.items())
        return (
            f"no answer from the OpenAI server at {tried}; start it or mend generate.openai.base_urls, "
            "then run again: finished conversations are kept"
        )


async def _together(workers: list[Coroutine]) -> None:
    """Run all workers; the first error stops the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _endpoint(base_url: str) -> str:
    try:
        url = httpx.URL(base_url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise DeepSpecError(f"generate.openai.base_urls: {base_url!r} is not an address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65535:
        raise DeepSpecError(
            f"generate.openai.base_urls: {base_url!r} is not an address like http://localhost:8000/v1"
        )
    return f"{url}/chat/completions" if url.path.endswith("/v1") else f"{url}/v1/chat/completions"


def _parsed(response: httpx.Response, endpoint: str) -> dict:
    """Parse the reply's JSON. A refusal of this request fails its row; one that all would meet stops the run."""
    if response.is_success:
        try:
            return response.json()
        except ValueError:
            raise UnusableError("the server's reply is not JSON") from None
    said = " ".join(response.text.split())[:200]
    if response.status_code in (400, 413, 422):
        raise UnusableError(f"the server refused the request (status {response.status_code}): {said}")
    hint = f"; is ${KEY_VARIABLE} set?" if response.status_code in (401, 403) else ""
    raise DeepSpecError(f"{endpoint} answered with status {response.status_code}{hint}: {said}")
