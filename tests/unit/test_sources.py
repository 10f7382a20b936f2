"""What people have: messages in every spelling, tools, images, presets, and files with bad rows in them."""

import gzip
import json
import tracemalloc
from collections import Counter

import pytest
from datasets import Dataset

from benchmarks.bad_rows import KINDS, write_bad_file
from deepspec.errors import DeepSpecError
from deepspec.messages.errors import BadRowError, RefusedRowError
from deepspec.messages.presets import Preset, preset_names
from deepspec.messages.prompt import Chat, Prompt
from deepspec.messages.prompts import read_prompts
from deepspec.messages.rows import read_row
from deepspec.messages.sources import JsonlSource, hub_source, preset_source
from deepspec.prompts.build import build_prompts, write_prompts
from deepspec.prompts.params import PromptsParams

CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": '{"place": "Paris"}'}}
TOOL = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
ASK = {"role": "user", "content": "What is the weather in Paris?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "18 C"}
SAY = {"role": "assistant", "content": "18 degrees."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


def roles(chat):
    return [message["role"] for message in chat.messages]


def build(path, count=50, **fields):
    params = PromptsParams(count=count, mix={f"jsonl:{path}": 1.0}, min_chars=3, **fields)
    return build_prompts(params, 0, [])


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# One row


def test_system_tools_calls_and_results_are_kept():
    row = {
        "messages": [{"role": "system", "content": "Be a pirate."}, ASK, CALLING, RESULT, SAY],
        "tools": [TOOL],
    }
    chat = read_row(row).chat
    assert roles(chat) == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.tools == ({"type": "function", "function": TOOL},)
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": "Paris"}}
    assert chat.messages[3]["tool_call_id"] == "c1"


SHAREGPT = {
    "system": "Be a pirate.",
    "tools": json.dumps([TOOL]),
    "conversations": [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"place": "Paris"}}'},
        {"from": "observation", "value": "18 C"},
        {"from": "gpt", "value": "18 degrees."},
    ],
}
HERMES = {
    "tools": [TOOL],
    "conversations": [
        {"from": "system", "value": "Be a pirate."},
        {"from": "human", "value": ASK["content"]},
        {
            "from": "gpt",
            "value": '<tool_call>\n{"arguments": {"place": "Paris"}, "name": "look"}\n</tool_call>',
        },
        {"from": "tool", "value": "<tool_response>\n18 C\n</tool_response>"},
        {"from": "gpt", "value": "18 degrees."},
    ],
}
LEGACY = {
    "functions": [TOOL],
    "messages": [
        {"role": "system", "content": "Be a pirate."},
        ASK,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "look", "arguments": '{"place": "Paris"}'},
        },
        {"role": "function", "name": "look", "content": {"degrees": 18}},
        SAY,
    ],
}


@pytest.mark.parametrize("row", [SHAREGPT, HERMES, LEGACY], ids=["sharegpt", "hermes", "legacy"])
def test_other_spellings_of_the_same_conversation_are_the_same(row):
    chat = read_row(row).chat
    assert roles(chat) == ["system", "user", "assistant", "tool", "assistant"]
    (call,) = chat.messages[2]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": {"place": "Paris"}}
    assert chat.messages[3]["tool_call_id"] == call["id"]
    assert chat.tools[0]["function"]["name"] == "look"


@pytest.mark.parametrize(
    ("messages", "error", "kind"),
    [
        (
            [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what is this?"}]}],
            RefusedRowError,
            "image",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
            RefusedRowError,
            "medium",
        ),
        ([ASK, CALLING, ASK], RefusedRowError, "a tool call without its result"),
        ([ASK, RESULT], RefusedRowError, "a tool result without its call"),
        ([ASK, CALLING, {**RESULT, "tool_call_id": "c9"}], RefusedRowError, "a tool result without its call"),
        ([ASK, SAY, SAY], RefusedRowError, "two assistant turns"),
        (
            [ASK, {**CALLING, "tool_calls": [{"function": {"name": "look", "arguments": "{oops"}}]}],
            BadRowError,
            "call",
        ),
        (
            [ASK, {**CALLING, "tool_calls": [{"function": {"arguments": "{}"}}]}],
            BadRowError,
            "malformed tool call",
        ),
        ([{"role": "narrator", "content": "x"}, ASK], BadRowError, "an unknown role"),
        ([{"role": "user", "content": "a \ud800 b"}], BadRowError, "half a character"),
        ([{"role": "user", "content": {"a": 1}}], BadRowError, "a message without text"),
    ],
)
def test_what_cannot_be_a_prompt_has_its_kind(messages, error, kind):
    with pytest.raises(error) as caught:
        read_row({"messages": messages})
    assert kind in caught.value.kind and type(caught.value) is error


def test_a_row_whose_picture_is_a_column_is_refused_too():
    with pytest.raises(RefusedRowError, match="an image, a video or a sound"):
        read_row(
            {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\nwhat is this?"}]}
        )


def test_an_answer_before_the_first_user_turn_is_left_out_and_counted(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"messages": [SAY, ASK, SAY]})
    built = build(path)
    assert [message["role"] for message in built.rows[0]["messages"]] == ["user", "assistant"]
    assert built.manifest["left_out"] == {"an assistant turn before the first user turn": 1}


def test_parallel_calls_are_paired_by_id_and_by_place():
    two = {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "c2"}]}
    by_id = [{**RESULT, "tool_call_id": "c2"}, RESULT]
    chat = read_row({"messages": [ASK, two, *by_id, SAY]}).chat
    assert [message.get("tool_call_id") for message in chat.messages][2:4] == ["c2", "c1"]
    bare = {"role": "assistant", "tool_calls": [{"function": CALL["function"]}] * 2}
    chat = read_row(
        {"messages": [ASK, bare, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]}
    ).chat
    assert [m["tool_call_id"] for m in chat.messages[2:]] == [c["id"] for c in chat.messages[1]["tool_calls"]]


def test_results_without_ids_are_paired_by_their_names_or_else_by_place():
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("look", "listen")]
    for names, order in ((("listen", "look"), [1, 0]), ((None, None), [0, 1]), (("hear", "see"), [0, 1])):
        results = [{"role": "function", "name": name, "content": "x"} for name in names]
        chat = read_row({"messages": [ASK, {"role": "assistant", "tool_calls": calls}, *results, SAY]}).chat
        ids = [call["id"] for call in chat.messages[1]["tool_calls"]]
        assert [message["tool_call_id"] for message in chat.messages[2:4]] == [ids[i] for i in order]


def test_thoughts_are_read_from_fields_and_parts():
    field = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    parts = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "2+2"}, {"type": "text", "text": "4"}],
    }
    for message in (field, parts):
        chat = read_row({"messages": [ASK, message]}).chat
        assert (chat.messages[1]["reasoning_content"], chat.messages[1]["content"]) == ("2+2", "4")


def test_messages_may_be_json_text_and_other_text_is_a_prompt():
    assert roles(read_row({"messages": json.dumps([ASK, SAY])}).chat) == ["user", "assistant"]
    assert read_row({"prompt": '[{"a": 1}]: what is this?'}).chat.turns == ('[{"a": 1}]: what is this?',)
    assert read_row({"prompt": '[{"a": 1}]'}).chat.turns == ('[{"a": 1}]',)


# Slots


def test_the_assistant_speaks_where_the_source_has_it_and_at_the_end():
    chat = read_row({"messages": [ASK, CALLING, RESULT, SAY, ASK]}).chat
    slots = chat.slots()
    assert [[m["role"] for m in slot.before] for slot in slots] == [["user"], ["tool"], ["user"]]
    assert [bool(slot.recorded) for slot in slots] == [True, True, False]


def test_user_turns_alone_are_each_answered():
    system = {"role": "system", "content": "Be brief."}
    slots = read_row({"messages": [system, ASK, {**ASK, "content": "And in Rome?"}]}).chat.slots()
    assert [len(slot.before) for slot in slots] == [2, 1]


# Files of prompts


def test_prompts_of_user_turns_alone_are_written_as_before_and_others_with_all_they_have(tmp_path):
    rich = {
        "messages": [ASK, CALLING, RESULT, SAY],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    path = lines(tmp_path / "p.jsonl", {"turns": ["What is it?"]}, {**rich, "metadata": {"by": "me"}})
    write_prompts(build(path), tmp_path / "out")
    prompts = {
        prompt.source and bool(prompt.chat.tools): prompt
        for prompt in read_prompts(tmp_path / "out/train.jsonl")
    }
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows if "turns" in row] == [{"id", "source", "turns"}]
    assert prompts[True].chat.chat_template_kwargs == {"enable_thinking": False}
    assert prompts[True].chat.metadata == {"by": "me"}
    assert prompts[True].chat.tools == read_row(rich).chat.tools
    assert prompts[False].turns == ("What is it?",)


def test_the_same_question_under_another_system_prompt_is_no_duplicate(tmp_path):
    pirate, poet = ({"system": f"Be a {who}.", "prompt": ASK["content"]} for who in ("pirate", "poet"))
    built = build(lines(tmp_path / "p.jsonl", pirate, poet, pirate))
    assert len(built.rows) == 2 and built.manifest["rejected"] == {"duplicate": 1}


def test_ids_depend_on_all_that_is_rendered():
    chats = [
        Chat.of_turns(["a"]),
        read_row({"messages": [ASK], "tools": [TOOL]}).chat,
        read_row({"messages": [ASK]}).chat,
        read_row({"messages": [ASK], "chat_template_kwargs": {"enable_thinking": False}}).chat,
    ]
    assert len({chat.id() for chat in chats}) == 4
    assert read_row({"messages": [ASK], "metadata": {"a": 1}, "tools": [TOOL]}).chat.id() == chats[1].id()


def test_token_ids_come_with_a_mask(tmp_path):
    good = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
    assert build(lines(tmp_path / "p.jsonl", good)).rows[0]["input_ids"] == [5, 6, 7]
    for bad in (
        {},
        {"loss_mask": [1]},
        {"loss_mask": [0, 0, 0]},
        {"loss_mask": [0, 1, 2]},
        {"loss_mask": "011"},
    ):
        with pytest.raises(BadRowError) as caught:
            read_row({"input_ids": [5, 6, 7], **bad})
        assert caught.value.kind == "malformed token ids"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "no user turn"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": 3}, "'tools' must be a list"),
        ({"input_ids": [1], "loss_mask": [1]}, "must mark an answer"),
    ],
)
def test_a_prompt_file_that_was_damaged_names_its_line(tmp_path, row, message):
    path = lines(tmp_path / "p.jsonl", {"id": "a", "source": "s", **row})
    with pytest.raises(DeepSpecError, match=rf"p\.jsonl:1: .*{message}.*'a'"):
        read_prompts(path)


# Bad rows


def bad_file(path, rows):
    """One line in a hundred is bad, of the kinds in turn."""
    return write_bad_file(path, (f"What is fact {i}?" for i in range(rows)))


def test_bad_rows_are_one_summary_and_nothing_else_is_lost(tmp_path):
    built = build(bad_file(tmp_path / "p.jsonl", 4000), count=5000)
    (found,) = built.manifest["sources"].values()
    assert found["accepted"] == 3960 and found["rows"] == 4000
    assert set(found["unusable"]) == set(KINDS)
    assert {kind["rows"] for kind in found["unusable"].values()} == {2}
    assert found["unusable"]["not JSON"] == {"rows": 2, "first_line": 100}
    assert sum("rows cannot be used" in note for note in built.manifest["notes"]) == 1


def test_a_large_file_is_not_held_in_memory(tmp_path):
    path = bad_file(tmp_path / "p.jsonl", 20_000)
    size = path.stat().st_size
    tracemalloc.start()
    source = JsonlSource(str(path), 0, 0.05)
    first = [candidate.turns for candidate, _ in zip(source, range(50), strict=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(first) == 50 and size > 800_000
    assert peak < size, "the line of 100,000 brackets is most of it"


def test_more_malformed_lines_than_allowed_stop_the_run_with_all_kinds(tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"turns": [f"What is {i}?"]} for i in range(8)), "{oops", '["a"]')
    with pytest.raises(DeepSpecError) as caught:
        build(path)
    assert f"{path}:9: malformed line" in str(caught.value)
    assert "2 of 10 lines are malformed (not JSON 1, not an object 1)" in str(caught.value)
    assert len(build(path, max_malformed_share=0.2).rows) == 8


def test_refused_rows_do_not_stop_the_run(tmp_path):
    image = json.loads(KINDS["an image or another medium"])
    path = lines(tmp_path / "p.jsonl", image, image, {"turns": ["What is it?"]})
    built = build(path)
    assert len(built.rows) == 1
    (found,) = built.manifest["sources"].values()
    assert found["unusable"] == {"an image or another medium": {"rows": 2, "first_line": 1}}


def test_a_file_of_refused_rows_alone_says_why(tmp_path):
    path = lines(tmp_path / "p.jsonl", KINDS["an image or another medium"].decode())
    with pytest.raises(DeepSpecError, match=r"no training prompt passed .*an image or another medium 1"):
        build(path)


def test_a_line_beyond_all_bounds_is_counted_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspec.messages.sources.LONGEST_LINE", 1000)
    path = lines(tmp_path / "p.jsonl", {"turns": ["x" * 3000]}, {"turns": ["What is it?"]})
    source = JsonlSource(str(path), 0, 0.5)
    assert source.faults.to_dict() == {"a line that is too long": {"rows": 1, "first_line": 1}}
    assert [candidate.turns for candidate in source] == [["What is it?"]]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_an_element_at_a_time(tmp_path, monkeypatch, indent):
    monkeypatch.setattr("deepspec.messages.sources._CHUNK", 64)
    rows = [{"turns": [f"What is fact {i}, \u2028 please?"]} for i in range(40)]
    path = tmp_path / "p.json"
    path.write_text("\ufeff" + json.dumps([*rows, {"turns": 3}], indent=indent, ensure_ascii=False))
    built = build(path, max_malformed_share=0.1)
    assert {row["turns"][0] for row in built.rows} == {row["turns"][0] for row in rows}
    (found,) = built.manifest["sources"].values()
    assert found["unusable"] == {"a field of another type": {"rows": 1, "first_line": 41}}
    path.write_text(json.dumps(rows, indent=indent)[:-40])
    with pytest.raises(DeepSpecError, match=r"p\.json: element 40 of the array cannot be read: ") as caught:
        build(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_arrays_is_no_array(tmp_path):
    path = lines(tmp_path / "p.jsonl", [ASK], [ASK, SAY])
    with pytest.raises(DeepSpecError, match=r"p\.jsonl:1: malformed line: expected an object, found list"):
        build(path)


def test_a_packed_file_gives_the_same_prompts(tmp_path):
    path = bad_file(tmp_path / "p.jsonl", 300)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    plain, packed = (build(file).rows for file in (path, tmp_path / "p.jsonl.gz"))
    assert [row["turns"] for row in plain] == [row["turns"] for row in packed]


def test_the_project_s_own_tool_conversations_are_many_and_pass_the_filters():
    built = build_prompts(PromptsParams(count=200, mix={"tools": 1.0}), 3, [])
    assert len(built.rows) == 200 and built == build_prompts(
        PromptsParams(count=200, mix={"tools": 1.0}), 3, []
    )
    assert {len(row["tools"]) for row in built.rows} == {4}


# Presets


def test_every_preset_says_where_and_what():
    assert {"ultrachat", "sharegpt", "open-perfectblend", "nemotron", "hermes-function-calling"} <= set(
        preset_names()
    )
    for name in preset_names():
        preset = Preset.named(name)
        assert preset.dataset.count("/") == 1 and preset.description.endswith(".")


def test_a_preset_reads_a_copy_of_its_dataset(tmp_path):
    row = {**HERMES, "conversations": [*HERMES["conversations"]], "category": "weather"}
    path = lines(tmp_path / "copy.jsonl", row)
    (candidate,) = preset_source(f"hermes-function-calling@{path}", 0, 0.0)
    assert roles(candidate.chat) == ["user", "assistant", "tool", "assistant"], "the tools are a column"
    assert candidate.chat.metadata == {"category": "weather"}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(DeepSpecError, match="unknown preset 'ultrachad'; did you mean 'ultrachat'"):
        preset_source("ultrachad", 0, 0.0)


def test_a_dataset_s_refused_rows_are_rejected_by_their_kind(tmp_path):
    rows = [
        {"messages": [ASK, SAY]},
        {"messages": [ASK, SAY, SAY]},
        {"messages": [{"role": "narrator", "content": "x"}]},
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    faults = Counter(candidate.fault for candidate in hub_source(f"{tmp_path}/saved", seed=0))
    assert faults == {None: 1, "two assistant turns in a row": 1, "an unknown role": 1}


def test_a_prompt_knows_its_turns():
    assert Prompt.of_turns("p", "s", ("a", "b")).turns == ("a", "b")
