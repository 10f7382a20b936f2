"""Synthetic conversations as a data set with its prompts, and as a prompt file with bad rows, however many.

Every word is a token, so that text and ids follow from each other without a tokenizer being asked; the tokenizer beside
the data knows them and has a chat template. Frequent words come more often, a fifth of a conversation is its prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from benchmarks.bad_rows import write_bad_file
from benchmarks.scale_side import DIGEST, VOCABULARY
from deepspec.files import digest, file_digest, replacing
from deepspec.progress import Progress

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [START, END, "user", "assistant", "\n", "<unk>"]
OPENING = [0, 2, 4]  # start, user, newline: all conversations begin with them
MIDDLE = [1, 4, 0, 3, 4]
PREFIX = len(OPENING)
_GROUP = 4096  # rows written at once


def words() -> list[str]:
    """Return the text of every token."""
    letters = islice(product(ascii_lowercase, repeat=4), VOCABULARY - len(SPECIAL))
    return SPECIAL + [" " + "".join(word) for word in letters]


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose tokens are `words`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=TEMPLATE
    ).save_pretrained(directory)


def write_data(directory: Path, rows: int, length: int) -> None:
    """Write `train.parquet` with manifest, `prompts.jsonl`, `source.jsonl` with bad rows, and the tokenizer."""
    import pyarrow.parquet

    with replacing(directory) as scratch, Progress("data", rows) as progress:
        scratch.mkdir()
        write_tokenizer(scratch / "tokenizer")
        with (
            pyarrow.parquet.ParquetWriter(scratch / "train.parquet", _schema()) as writer,
            (scratch / "prompts.jsonl").open("w") as prompts,
        ):
            for table in _groups(rows, length):
                writer.write_table(table)
                for id, messages in zip(table["id"].to_pylist(), table["messages"].to_pylist(), strict=True):
                    row = {"id": id, "source": "file", "turns": [messages[0]["content"]]}
                    prompts.write(json.dumps(row) + "\n")
                progress.advance(len(table))
        with (scratch / "prompts.jsonl").open() as prompts:
            write_bad_file(scratch / "source.jsonl", (json.loads(line)["turns"][0] for line in prompts))
        (scratch / "failures.jsonl").touch()
        manifest = {"rows": rows, "failures": 0, "digest": file_digest(scratch / "train.parquet")}
        (scratch / "manifest.json").write_text(json.dumps(manifest))


def _schema() -> Any:
    from deepspec.answers.shards import FEATURES

    return FEATURES.arrow_schema


def _groups(rows: int, length: int) -> Iterator[Any]:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    texts = words()
    for start in range(0, rows, _GROUP):
        count = min(_GROUP, rows - start)
        lengths = rng.integers(length * 3 // 4, length * 5 // 4 + 1, count)
        asked = lengths // 5  # tokens of each prompt
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        ids = (rng.random(offsets[-1]) ** 4 * (VOCABULARY - len(SPECIAL)) + len(SPECIAL)).astype(np.int32)
        first, answers = offsets[:-1] + PREFIX, offsets[:-1] + PREFIX + asked + len(MIDDLE)
        for i, token in enumerate(OPENING):
            ids[offsets[:-1] + i] = token
        for i, token in enumerate(MIDDLE):
            ids[answers - len(MIDDLE) + i] = token
        ids[offsets[1:] - 1] = SPECIAL.index(END)
        mask = (np.arange(offsets[-1]) >= np.repeat(answers, lengths)).astype(np.int8)

        def said(begin: Any, end: Any, ids: Any = ids) -> list[str]:
            spans = zip(begin.tolist(), end.tolist(), strict=True)
            return ["".join(map(texts.__getitem__, ids[a:b].tolist())) for a, b in spans]

        questions, replies = said(first, first + asked), said(answers, offsets[1:] - 1)
        talks = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            for question, reply in zip(questions, replies, strict=True)
        ]
        constants = {"target": DIGEST, "temperature": 0.7, "top_p": 1.0, "seed": 1, "engine": "local"}
        columns = {
            "id": [digest(f"{start + i}") for i in range(count)],
            "source": ["file"] * count,
            "messages": talks,
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids)),
            "loss_mask": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(mask)),
            "finish_reasons": [["stop"]] * count,
            **{name: [value] * count for name, value in constants.items()},
        }
        yield pa.table(columns, schema=_schema())
