"""Where an answer ends: at the token that completes a stop string, whatever its round committed with it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from deepspec.decoding.request import Request
from deepspec.decoding.slot import Slot

PIECES = ["▁", "a", "b", "▁a", "▁b", "▁▁", "c", "ab", "▁ab", "x", "\n"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
IDS = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
NOTHING = 999  # decodes to no text


@pytest.fixture(scope="module")
def target() -> Any:
    """What a slot asks of a target whose tokenizer has pieces, and bytes where it has none (Llama 2, Gemma)."""
    tokenizer = Tokenizer(models.BPE(IDS, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(list(parts))
    return SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer), stop_ids={IDS["</s>"]}
    )


def written(*pieces: str) -> list[int]:
    return [i for piece in pieces for i in ([IDS[piece]] if piece in IDS else in_bytes(piece))]


def in_bytes(text: str) -> list[int]:
    return [IDS[BYTES[byte]] for byte in text.encode()]


def ended(target: Any, tokens: list[int], stop: tuple[str, ...], sizes: Iterator[int]) -> tuple[str, int]:
    """Commit rounds of these sizes; return why the answer ended and its tokens."""
    slot, begun = Slot(Request([1], len(tokens), stop=stop), target, 10**6), 0
    while slot.finish_reason is None:
        *accepted, last = tokens[begun : begun + next(sizes)]
        begun += slot.commit(accepted, last)
    return slot.finish_reason, len(slot.new_tokens)


def first_end(target: Any, tokens: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """Return the same by the text of the whole answer so far."""
    for count in range(1, len(tokens) + 1):
        text = target.tokenizer.decode(tokens[:count])
        if tokens[count - 1] in target.stop_ids or any(each in text for each in stop):
            return "stop", count
    return "length", len(tokens)


@pytest.mark.parametrize(
    ("tokens", "stop", "end"),
    [
        (written("🎈", "🎉", "x", "a"), "🎉", 8),
        (written("你", "好", "。", "a"), "。", 9),
        (written("a", "é"), "é", 3),
        ([*written("a"), *repeat(NOTHING, 3), *written("▁b", "x")], " b", 5),
        (written(*["x"] * 50, "🎉", "🎉", "a", "b"), "🎉ab", 60),
        (written(*["x"] * 50, "🎉", "b", *"abcabcabcabc"), "\N{REPLACEMENT CHARACTER}b", 67),
    ],
    ids=["emoji", "chinese", "last", "nothing", "long", "broken"],
)
def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it(target, tokens, stop, end):
    for size in (1, 2, 3, 7, len(tokens)):
        reason, count = ended(target, tokens, (stop,), repeat(size))
        assert count == end and reason == ("length" if "\N{REPLACEMENT CHARACTER}" in stop else "stop")


def test_rounds_of_any_size_end_where_the_whole_text_does(target):
    chances = random.Random(0)
    texts = ["🎉", "é", "你", "a", "b", "▁a", "▁", "x", "ab", "▁ab", "\n"]
    stops = ["a", "ab", " a", "🎉", "é", "x\n", "b a", "  ", "你好" * 20, "🎉a", "你a"]
    for _ in range(300):
        tokens = written(*chances.choices(texts, k=30), chances.choice(["</s>", "c"]), "x", "🎉", "a")
        stop = tuple(chances.sample(stops, chances.choice((1, 2))))
        sizes = iter(lambda: chances.randint(1, 6), 0)
        assert ended(target, tokens, stop, sizes) == first_end(target, tokens, stop), (tokens, stop)
