"""What keeps a candidate out of the training prompts, each with a reason that the manifest counts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deepspec.messages.prompt import Chat
from deepspec.messages.sources import Candidate
from deepspec.prompts.overlap import Overlap
from deepspec.prompts.params import PromptsParams
from deepspec.prompts.words import words

# Pieces of chat templates: a prompt that carries one would end its own turn.
TEMPLATE_MARKER = re.compile(
    r"<\|[\w ]{1,40}\|>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>|<｜.{1,40}?｜>"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")
CHARACTER_RUN = re.compile(r"([^\W\d_])\1{9,}|(\S)\2{39,}")
MIN_ALPHANUMERIC = 0.5  # of the visible characters; code lies near 0.7, prose above 0.9
MIN_LETTERS = 0.2
REPETITION_NGRAM = 4
MAX_REPETITION = 0.5


@dataclass(frozen=True)
class Judged:
    """What was found of a candidate alone.

    Attributes:
        line: its row, as a line of JSON.
        key: equal for candidates that ask the same (`chat_key`), 16 bytes.
        fault: why it cannot be used; None: it can, unless it is there already.
        left_out: what of it was left out, in words.
    """

    line: bytes
    key: bytes
    fault: str | None
    left_out: tuple[str, ...]


class Sieve:
    """Judges candidates, remembers those it let through (for duplicates) and counts why others fell."""

    def __init__(self, params: PromptsParams, overlap: Overlap) -> None:
        self._params = params
        self._overlap = overlap
        self._seen: set[bytes] = set()  # keys, not texts: of a million prompts they take 0.1 GB
        self.rejected: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()  # of those let through

    def judge(self, source: str, candidate: Candidate) -> Judged:
        """Judge a candidate by itself, which any process may do."""
        fault = self._fault(candidate)
        if fault:
            return Judged(b"", b"", fault, ())
        row = {"id": candidate.chat.id(), "source": source, **candidate.chat.fields()}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        key = hashlib.sha256(chat_key(candidate.chat).encode()).digest()[:16]
        return Judged(line, key, None, candidate.left_out)

    def _fault(self, candidate: Candidate) -> str | None:
        if candidate.fault:
            return candidate.fault
        if candidate.chat.input_ids:  # no text to judge
            return None
        turns = candidate.turns
        if not turns or len(turns[0]) < self._params.min_chars:
            return "too short"
        if max(map(len, turns)) > self._params.max_chars:
            return "too long"
        for turn in turns:
            if reason := noise(turn):
                return reason
        if any(self._overlap.hits(turn) for turn in turns):
            return "in evaluation"
        for message in candidate.chat.messages:
            if message["role"] != "user" and TEMPLATE_MARKER.search(message["content"]):
                return "template marker"
        return None

    def fault(self, judged: Judged) -> str | None:
        """Return why the candidate cannot be used, or None; changes nothing."""
        return judged.fault or ("duplicate" if judged.key in self._seen else None)

    def admit(self, judged: Judged) -> bool:
        """Let the candidate through, or count the reason against it."""
        if reason := self.fault(judged):
            self.rejected[reason] += 1
            return False
        self._seen.add(judged.key)
        self.left_out.update(judged.left_out)
        return True


def chat_key(chat: Chat) -> str:
    """Return a key that is equal for conversations that ask the same, under one system prompt, with the same tools."""
    if chat.input_ids:
        return chat.id()
    said = [
        message["content"] if message["role"] != "user" else duplicate_key([message["content"]])
        for message in chat.messages
        if message["role"] in ("user", "system", "developer")
    ]
    names = sorted(str(tool["function"]["name"]) for tool in chat.tools)
    return "\n".join([*said, *names])


def duplicate_key(turns: Sequence[str]) -> str:
    """Return a key that is equal for prompts that differ only in case, spacing or punctuation, not in numbers."""
    return "\n".join(" ".join(words(turn)) for turn in turns)


def noise(text: str) -> str | None:
    """Return why a text is not something that a person would type, or None."""
    if not text.strip():
        return "empty turn"
    if CONTROL.search(text):
        return "control characters"
    if TEMPLATE_MARKER.search(text):
        return "template marker"
    if CHARACTER_RUN.search(text):
        return "character run"
    visible = [char for char in text if not char.isspace()]
    if sum(char.isalnum() for char in visible) < MIN_ALPHANUMERIC * len(visible):
        return "mostly symbols"
    if sum(char.isalpha() for char in visible) < MIN_LETTERS * len(visible):
        return "few letters"
    return "repetitive" if _repetition(text) > MAX_REPETITION else None


def _repetition(text: str) -> float:
    """Return the share of word n-grams that repeat an earlier one."""
    found = words(text)
    grams = [tuple(found[i : i + REPETITION_NGRAM]) for i in range(len(found) - REPETITION_NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
