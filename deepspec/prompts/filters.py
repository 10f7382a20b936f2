"""What keeps a candidate out of the training prompts, each with a reason that the manifest counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from deepspec.messages.prompt import Chat
from deepspec.messages.sources import Candidate
from deepspec.prompts.overlap import Overlap, words
from deepspec.prompts.params import PromptsParams

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


class Sieve:
    """Judges candidates, remembers those it let through (for duplicates) and counts why others fell."""

    def __init__(self, params: PromptsParams, overlap: Overlap) -> None:
        self._params = params
        self._overlap = overlap
        self._seen: set[str] = set()
        self.rejected: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()  # of those let through

    def fault(self, candidate: Candidate) -> str | None:
        """Return why the candidate cannot be used, or None; changes nothing."""
        if candidate.fault:
            return candidate.fault
        if candidate.chat.input_ids:  # no text to judge
            return "duplicate" if chat_key(candidate.chat) in self._seen else None
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
        return "duplicate" if chat_key(candidate.chat) in self._seen else None

    def admit(self, candidate: Candidate) -> bool:
        """Let the candidate through, or count the reason against it."""
        if reason := self.fault(candidate):
            self.rejected[reason] += 1
            return False
        self._seen.add(chat_key(candidate.chat))
        self.left_out.update(candidate.left_out)
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
