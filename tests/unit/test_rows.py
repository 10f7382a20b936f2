"""Rows of kinds that people have beside the usual ones: each is read right, or refused by its kind in one line."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from deepspec.errors import DeepSpecError
from deepspec.messages.errors import BadRowError, RefusedRowError
from deepspec.messages.prompt import chat_of
from deepspec.messages.rows import read_row
from deepspec.messages.sources import JsonlSource, hub_source
from deepspec.prompts.build import build_prompts, write_prompts
from deepspec.prompts.params import PromptsParams

ASK = {"role": "user", "content": "What is the weather in Paris?"}
SAY = {"role": "assistant", "content": "18 degrees."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"place": "Paris"}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "18 C"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CHAT = ["user", "assistant"]
CALLED = ["user", "assistant", "tool", "assistant"]


def calling(**call) -> dict:
    """A conversation with one call of the tool, spelt as given."""
    return {
        "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL | call]}, RESULT, SAY]
    }


def text(call: str) -> dict:
    """The same, with the call in the assistant's text."""
    return {
        "messages": [ASK, {"role": "assistant", "content": call}, {"role": "tool", "content": "18 C"}, SAY]
    }


def answered(**fields) -> dict:
    return {"messages": [ASK, {"role": "assistant", **fields}]}


READ = {
    "ShareGPT: other cases and blanks in roles": (
        {"conversations": [{"from": " Human", "value": ASK["content"]}, {"from": "GPT", "value": "18."}]},
        CHAT,
    ),
    "ShareGPT: a system role and a system column": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "system", "value": "Be a pirate."},
                {"from": "human", "value": "How?"},
            ],
        },
        ["system", "user"],
    ),
    "both spellings of a role, one of them null": (
        {"messages": [{"role": None, "from": "human", "content": None, "value": "How?"}]},
        ["user"],
    ),
    "a developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, ASK]},
        ["developer", "user"],
    ),
    "two system messages": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "system", "content": "Be kind."},
                ASK,
            ]
        },
        ["system", "system", "user"],
    ),
    "content as parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "How?", "image_url": None}, "Why?"]}
            ]
        },
        ["user"],
    ),
    "a part without a type": ({"messages": [{"role": "user", "content": [{"text": "How?"}]}]}, ["user"]),
    "a refusal": (answered(content=None, refusal="I cannot."), CHAT),
    "a refusal as a part": (answered(content=[{"type": "refusal", "refusal": "I cannot."}]), CHAT),
    "a thought twice": (answered(content="18.", reasoning="So.", reasoning_content="So."), CHAT),
    "an empty answer": (answered(content=""), CHAT),
    "a thought and no answer": (answered(content=None, reasoning="So."), CHAT),
    "arguments as an object": (calling(function={"name": "look", "arguments": {"place": "Paris"}}), CALLED),
    "arguments that are null": (calling(function={"name": "look", "arguments": None}), CALLED),
    "arguments that are empty": (calling(function={"name": "look", "arguments": ""}), CALLED),
    "calls as text": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": json.dumps([CALL])}, RESULT, SAY]},
        CALLED,
    ),
    "a call as a Python literal": (
        text("<tool_call>\n{'name': 'look', 'arguments': {'place': 'Paris'}}\n</tool_call>"),
        CALLED,
    ),
    "results in the user's place": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "user", "content": "<tool_response>\n18 C\n</tool_response>"},
                SAY,
            ]
        },
        CALLED,
    ),
    "a result that is a list": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "tool_calls": [CALL]},
                {**RESULT, "content": [{"degrees": 18}, {"degrees": 19}]},
                SAY,
            ]
        },
        CALLED,
    ),
    "several calls in one function_call turn": (
        {
            "conversations": [
                {"from": "human", "value": "Paris and Rome?"},
                {"from": "function_call", "value": json.dumps([CALL["function"], CALL["function"]])},
                {"from": "observation", "value": "18 C"},
                {"from": "observation", "value": "20 C"},
            ]
        },
        ["user", "assistant", "tool", "tool"],
    ),
    "tools as texts": ({"messages": [ASK], "tools": [json.dumps(TOOL)]}, ["user"]),
    "a struct of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["How?", "So."], "name": [None, None]}},
        CHAT,
    ),
    "a log of a server": (
        {
            "custom_id": "1",
            "request": {"model": "m", "messages": [ASK], "tools": [TOOL]},
            "response": {"status_code": 200, "body": {"choices": [{"message": SAY}]}},
        },
        CHAT,
    ),
    "a log as text": (
        {
            "request": json.dumps({"messages": [ASK], "tools": [TOOL]}),
            "response": json.dumps({"choices": [{"message": {"content": "18 degrees."}}]}),
        },
        CHAT,
    ),
    "a log of a failed request": ({"request": {"messages": [ASK]}, "response": {"choices": []}}, ["user"]),
    "turns before the prompt": (
        {
            "system": "Be brief.",
            "query": "And in Rome?",
            "response": "20.",
            "history": [["In Paris?", "18."]],
        },
        ["system", "user", "assistant", "user", "assistant"],
    ),
    "an answer that is a message": ({"input": [ASK], "output": SAY}, CHAT),
    "an empty list before the prompt": ({"messages": [], "prompt": "How?"}, ["user"]),
    "messages as text with blanks": ({"messages": json.dumps([ASK, SAY], indent=2)}, CHAT),
    "other names of roles": (
        {"conversations": [{"from": "human", "value": "How?"}, {"from": "ai", "value": "So."}]},
        CHAT,
    ),
    "a result by another name": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "output": "18 C"},
            ]
        },
        CALLED[:3],
    ),
    "a batch request": ({"custom_id": "1", "method": "POST", "body": {"messages": [ASK]}}, ["user"]),
    "messages and choices": ({"messages": [ASK], "choices": [{"message": SAY}]}, CHAT),
    "missing values of a table": (
        {"messages": [ASK], "system": float("nan"), "tools": float("nan"), "prompt": float("nan")},
        ["user"],
    ),
    "names": ({"messages": [{**ASK, "name": "Ada"}, {**SAY, "name": None}]}, CHAT),
}


@pytest.mark.parametrize(("row", "roles"), READ.values(), ids=READ)
def test_a_row_is_read(row, roles):
    chat = read_row(row).chat
    assert [message["role"] for message in chat.messages] == roles
    assert all(isinstance(message["content"], str) for message in chat.messages)
    results = [message for message in chat.messages if message["role"] == "tool"]
    calls = [call for message in chat.messages for call in message.get("tool_calls", [])]
    assert [result["tool_call_id"] for result in results] == [call["id"] for call in calls]
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
    assert not chat.tools or chat.tools[0]["function"]["name"] == "look"


def test_nothing_of_these_is_lost():
    said = {name: read_row(row).chat.messages for name, (row, _) in READ.items()}
    assert said["content as parts"][0]["content"] == "How?Why?"
    assert said["a refusal"][1]["content"] == said["a refusal as a part"][1]["content"] == "I cannot."
    assert said["a thought twice"][1]["reasoning_content"] == "So."
    assert json.loads(said["a result that is a list"][2]["content"]) == [{"degrees": 18}, {"degrees": 19}]
    assert said["results in the user's place"][2]["content"] == "18 C"
    assert said["a call as a Python literal"][1]["tool_calls"][0]["function"]["arguments"] == {
        "place": "Paris"
    }
    assert said["names"][0]["name"] == "Ada" and "name" not in said["names"][1]
    assert said["a log of a server"][1]["content"] == said["a log as text"][1]["content"] == "18 degrees."
    assert said["a result by another name"][2]["content"] == "18 C"
    assert [message["content"] for message in said["turns before the prompt"]] == [
        *("Be brief.", "In Paris?", "18.", "And in Rome?", "20.")
    ]


DEEP: dict = {}
for _ in range(970):  # near the depth at which Python stops
    DEEP = {"in": DEEP}

REFUSED = {
    "a part of an unknown type": answered(content=[{"type": "tool_use", "name": "look", "input": {}}]),
    "an image or another medium": {"messages": [{"role": "user", "content": "what?", "images": ["cat.png"]}]},
    "an image or another medium ": {"messages": [{"role": "user", "content": [{"image": "cat.png"}]}]},
    "an image or another medium  ": {"messages": [{"role": "user", "content": [{"type": "input_file"}]}]},
    "a thought that is no text": answered(content="18.", reasoning=["So."]),
    "a message without text": {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
    "a message without text ": answered(content=None, tool_calls=[]),
    "a malformed tool call": text("<tool_call>{'name': look}</tool_call>"),
    "an unknown role": {"messages": [{"role": None, "content": "x"}]},
    "half a character": calling(function={"name": "look", "arguments": '{"place": "\\ud800"}'}),
    "half a character ": {"messages": [ASK], "metadata": {"by": "\ud800"}},
    "nested too deeply": {"messages": [ASK], "metadata": DEEP},
    "nested too deeply ": {"messages": [ASK], "tools": [{"name": "look", "parameters": DEEP}]},
    "a value that JSON cannot hold": calling(function={"name": "look", "arguments": '{"n": NaN}'}),
    "a value that JSON cannot hold ": {"messages": [ASK], "chat_template_kwargs": {"n": float("inf")}},
    "a malformed tool call ": calling(function={"name": "look", "arguments": "{'n': {1, 2}}"}),
    "a field of another type": {"prompt": "How?", "history": "What?"},
    "a message without text  ": {
        "messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "results": "18 C"}]
    },
    "padded token ids ": {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "attention_mask": [1, 1]},
    "padded token ids": {"input_ids": [5, 6, 0], "loss_mask": [0, 1, 0], "attention_mask": [1, 1, 0]},
    "malformed token ids": {"input_ids": [5, 6, 7], "loss_mask": [0, 1]},
    "malformed token ids ": {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]},
}


@pytest.mark.parametrize(("kind", "row"), REFUSED.items(), ids=REFUSED)
def test_a_row_is_refused_by_its_kind(kind, row):
    with pytest.raises(BadRowError) as caught:
        read_row(row)
    assert caught.value.kind == kind.strip() and "\n" not in str(caught.value)
    assert isinstance(caught.value, RefusedRowError) == (kind.strip() in (
        "a part of an unknown type",
        "an image or another medium",
    ))  # fmt: skip


def test_token_ids_come_with_a_mask_of_any_trainer():
    rows = [
        {"loss_mask": [0, 1, 1]},
        {"loss_mask": [False, True, True]},
        {"assistant_masks": [0, 1, 1]},
        {"completion_mask": [0, 1, 1], "attention_mask": [1, 1, 1]},
        {"labels": [-100, 6, 7]},
    ]
    assert {read_row({"input_ids": [5, 6, 7], **row}).chat.loss_mask for row in rows} == {(0, 1, 1)}


def test_names_of_arguments_are_texts_and_those_of_a_client_s_log_are_kept():
    chat = read_row(calling(function={"name": "look", "arguments": "{1: (2, 3), 'a': None}"})).chat
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"1": [2, 3], "a": None}
    assert len(chat.id()) == 16
    log = {"request": {"messages": [ASK], "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}}
    assert read_row(log).chat.chat_template_kwargs == {"enable_thinking": False}
    assert read_row({"messages": [ASK], "chat_template_kwargs": ""}).chat.chat_template_kwargs == {}


def test_what_a_log_says_of_its_answer_is_kept_where_it_is_not_whole_or_has_its_ids():
    def logged(**choice):
        chat = read_row(
            {"messages": [ASK], "choices": [{"message": SAY, **choice}], "prompt_token_ids": [1]}
        ).chat
        return chat_of(json.loads(json.dumps(chat.fields()))).reply

    assert [logged(finish_reason=reason) for reason in (None, "stop", "tool_calls")] == [{}, {}, {}]
    assert logged(finish_reason="length") == {"finish_reason": "length"}
    assert logged(token_ids=[5, 6]) == {"token_ids": [5, 6], "prompt_token_ids": [1]}


def test_metadata_is_handed_on_whatever_it_is():
    day = datetime.datetime(2026, 11, 29)
    rows = [{"by": {"who": ["me"]}}, '{"by": "me"}', "a note", ["a"], {"at": day}, None]
    found = [read_row({"messages": [ASK], "metadata": value}).chat.metadata for value in rows]
    assert found == [
        {"by": {"who": ["me"]}},
        {"by": "me"},
        {"metadata": "a note"},
        {"metadata": ["a"]},
        {"at": "2026-11-29 00:00:00"},
        {},
    ]


def test_a_mark_at_the_beginning_other_line_ends_and_missing_numbers_change_nothing(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"turns": ["What is it?"]}\r\n\r\n\xef\xbb\xbf{"turns": ["What was it?"], "metadata": {"x": NaN}}'
    )
    params = PromptsParams(count=5, mix={f"jsonl:{path}": 1.0}, min_chars=3)
    write_prompts(build_prompts(params, 0, []), tmp_path / "out")
    strict = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    lines = (tmp_path / "out/train.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=strict) for line in lines]
    assert sorted(bool(row.get("metadata")) for row in rows) == [False, True]


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_is_read_and_a_cut_one_is_one_line(tmp_path, suffix):
    data = b"".join(b'{"turns": ["What is fact %d, please?"]}\n' % i for i in range(3000))
    path = tmp_path / f"p.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](data))
    assert sum(1 for _ in JsonlSource(str(path), 0)) == 3000
    path.write_bytes(PACKERS[suffix](data)[: -len(PACKERS[suffix](data)) // 2])
    with pytest.raises(DeepSpecError, match=r"p\.jsonl.*(cannot be read|malformed)"):
        JsonlSource(str(path), 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "is a directory; name a file in it, or .*hub:"), ("p.parquet", "not JSONL; .*hub:")],
)
def test_what_is_no_jsonl_says_what_to_do(tmp_path, name, said):
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(DeepSpecError, match=said):
        JsonlSource(str(tmp_path / name), 0)


def test_a_directory_of_parquet_files_with_structs_and_large_strings_is_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tools = [
        [{"name": "look", "parameters": {"place": {"type": "string"}, "day": None}}],
        [{"name": "look", "parameters": {"place": None, "day": {"type": "string"}}}],
    ]
    message = pyarrow.struct([("role", pyarrow.large_string()), ("content", pyarrow.large_string())])
    for i, own in enumerate(tools):
        table = pyarrow.table(
            {
                "messages": pyarrow.array([[ASK, SAY]], pyarrow.large_list(message)),
                "tools": pyarrow.array(
                    [own],
                    pyarrow.list_(
                        pyarrow.struct(
                            [
                                ("name", pyarrow.string()),
                                (
                                    "parameters",
                                    pyarrow.struct(
                                        [
                                            (key, pyarrow.struct([("type", pyarrow.string())]))
                                            for key in ("place", "day")
                                        ]
                                    ),
                                ),
                            ]
                        )
                    ),
                ),
                "metadata": pyarrow.array([{"at": datetime.datetime(2026, 11, 29)}]),
            }
        )
        (tmp_path / "set").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / f"set/part-{i}.parquet")
    found = [candidate.chat for candidate in hub_source(str(tmp_path / "set"), seed=0)]
    assert [[message["role"] for message in chat.messages] for chat in found] == [CHAT, CHAT]
    assert {tuple(chat.tools[0]["function"]["parameters"]) for chat in found} == {("place",), ("day",)}
    assert all(chat.metadata == {"at": "2026-11-29 00:00:00"} for chat in found)


def test_pictures_of_a_dataset_are_refused_without_a_package_that_reads_them(tmp_path):
    picture = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    data = datasets.Dataset.from_list(
        [
            {"image": {"bytes": b"PNG", "path": None}, "more": [], "prompt": "What is this?"},
            {"image": None, "more": [{"bytes": b"PNG", "path": None}], "prompt": "And this?"},
            {"image": None, "more": [], "prompt": "What is it?"},
        ],
        features=datasets.Features(
            {"image": picture, "more": datasets.List(picture), "prompt": datasets.Value("string")}
        ),
    )
    kinds = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "prompt": datasets.Value("string"),
        }
    )
    data = data.rename_column("more", "images").cast(kinds)
    data.save_to_disk(tmp_path / "saved")
    faults = Counter(candidate.fault for candidate in hub_source(str(tmp_path / "saved"), seed=0))
    assert faults == {"an image or another medium": 2, None: 1}


def test_a_dataset_may_be_a_log_and_several_configurations_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    log = {
        "request": json.dumps({"messages": [ASK]}),
        "response": json.dumps({"choices": [{"message": SAY}]}),
    }
    for name in ("chat", "code"):
        (tmp_path / f"set/{name}").mkdir(parents=True)
        (tmp_path / f"set/{name}/train.jsonl").write_text(json.dumps(log) + "\n")
    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- {config_name: chat, data_files: chat/*.jsonl}\n"
        "- {config_name: code, data_files: code/*.jsonl}\n---\n"
    )
    (found,) = hub_source(f"{tmp_path}/set:chat/train", seed=0)
    assert [message["role"] for message in found.chat.messages] == CHAT
    with pytest.raises(DeepSpecError, match=r"could not be loaded \(.*chat.*code.*\); check") as caught:
        list(hub_source(f"{tmp_path}/set", seed=0))
    assert "\n" not in str(caught.value)


def test_long_texts_full_of_marks_are_read_in_no_time():
    marks = "<tool_response>a</tool_response>" * 2000 + "?"
    assert read_row({"turns": [marks]}).chat.turns == (marks,)
    assert read_row(answered(content="<tool_call>" + " " * 50_000 + "?")).chat.messages[1]["content"]
