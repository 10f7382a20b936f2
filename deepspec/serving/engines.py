"""Prompts through an engine: one that is started here for each way of decoding, or one that is served elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.progress import watched
from deepspec.serving.environment import Environment
from deepspec.serving.launch import serving
from deepspec.serving.protocols import VLLM, Answer, Client, Prompt

WARM_UP = 16  # tokens
Failed = dict[str, str]  # why, by the draft's name
Answers = tuple[list[Answer], list[list[Answer]]]  # with the draft; plain, a list a run


@dataclass(frozen=True)
class Work:
    """What every way of decoding is asked."""

    prompts: tuple[Prompt, ...]
    limit: int  # new tokens
    stop_ids: tuple[int, ...]
    dtype: str
    max_length: int


@dataclass(frozen=True, eq=False)
class Draft:
    """A draft of ours and how vLLM is told of its export (empty for a server elsewhere)."""

    name: str
    digest: str
    tokens: int  # drafted a verification
    config: dict[str, Any]
    trained: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "draft_digest": self.digest,
            "method": self.config.get("method"),
            "speculative_tokens": self.tokens,
        }

    @property
    def gated(self) -> bool:
        """Check whether the draft must pass: an engine's n-gram is its own rule, not an export."""
        return self.trained


def local(
    environment: Environment, target: Path, drafts: Sequence[Draft], work: Work
) -> tuple[str | None, dict[str, Answers], Failed]:
    """Decode with vLLM plain, with each draft, and plain again.

    Returns its version, the answers by draft, and the drafts that it did not serve.
    """

    def decode(name: str, speculative: dict[str, Any] | None) -> list[Answer]:
        with serving(environment, target, work.dtype, work.max_length, speculative, name) as address:
            client = VLLM(address, work.stop_ids)
            return decode_all(client, work, speculative is not None, f"{name}, vLLM")

    before = decode("plain", None)
    drafted: dict[str, list[Answer]] = {}
    failed: Failed = {}
    for draft in drafts:
        try:
            drafted[draft.name] = decode(draft.name, draft.config)
        except DeepSpecError as error:
            failed[draft.name] = str(error)
    plain = [before, decode("plain", None)] if drafted else []
    return environment.version, {name: (answers, plain) for name, answers in drafted.items()}, failed


def remote(
    kind: type[Client], base_url: str, plain_url: str | None, draft: Draft, work: Work
) -> tuple[str | None, dict[str, Answers]]:
    """Decode with a running server with the draft, and with one without it where there is one."""
    client = kind(base_url, work.stop_ids)
    version = client.version()
    plain = []
    if plain_url:
        plain.append(decode_all(kind(plain_url, work.stop_ids), work, False, f"plain, {kind.engine}"))
    drafted = decode_all(client, work, True, f"{draft.name}, {kind.engine}")
    return version, {draft.name: (drafted, plain)}


def decode_all(client: Client, work: Work, drafting: bool, what: str) -> list[Answer]:
    """Decode one prompt after the other, after one that is not counted."""
    client.answer(work.prompts[0], min(WARM_UP, work.limit), False)
    return [client.answer(prompt, work.limit, drafting) for prompt in watched(work.prompts, what)]
