"""Prompts of an evaluation that are messages: what the target is asked before each of its answers."""

from __future__ import annotations

import json
import logging

import pytest

from deepspec.errors import DeepSpecError
from deepspec.evaluation.bench import check_prompts
from deepspec.evaluation.runs import prompt_seed
from deepspec.tasks.dialogue import first_turn, prompt_ids, turns_of
from deepspec.tasks.task import Task, evaluation_texts, load_task
from tests.chat_templates import FAMILIES
from tests.fake_target import FakeTarget

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "look", "arguments": '{"place": "Paris"}'},
}
TALK = {
    "messages": [
        {"role": "system", "content": "Be a pirate."},
        {"role": "user", "content": "weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "18 C", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 18 degrees."},
        {"role": "user", "content": "thanks, and London?"},
    ],
    "tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}],
}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}


def task(directory, *rows, **fields) -> Task:
    (directory / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"name": "mine", "version": "1", "category": "chat", "source": "jsonl:mine.jsonl"}
    path = directory / "mine.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (known | fields).items()))
    return load_task(path)


def test_the_target_answers_every_turn_and_recorded_calls_and_results_stand(tmp_path):
    (chat,) = task(tmp_path, TALK).prompts
    target = FAMILIES["hermes"].target()
    said = ["I shall look.", "Eighteen, arr."]
    texts = [target.text(prompt_ids(target, chat, said[:turn])) for turn in range(3)]
    assert len(turns_of(chat)) == 3
    assert "pirate" in texts[0] and "<tools>" in texts[0] and "18 C" not in texts[0]
    assert "18 C" in texts[1] and '"Paris"' in texts[1] and said[0] not in texts[1]
    assert said[1] in texts[2] and "18 degrees" not in texts[2] and "London" in texts[2]
    assert prompt_ids(target, first_turn(chat)) == prompt_ids(target, chat)


def test_template_arguments_of_a_prompt_are_used(tmp_path):
    ask = {"messages": [{"role": "user", "content": "Why?"}]}
    off = {**ask, "chat_template_kwargs": {"enable_thinking": False}}
    target = FAMILIES["qwen3"].target()
    texts = [target.text(prompt_ids(target, chat)) for chat in task(tmp_path, ask, off).prompts]
    assert texts[1].removeprefix(texts[0]).split() == ["<think>", "</think>"]


def test_recorded_answers_of_mere_talk_change_nothing(tmp_path):
    turns = task(tmp_path, {"turns": ["Why?", "Really?"]})
    say = {"role": "assistant", "content": "Because."}
    ask, again = ({"role": "user", "content": text} for text in ("Why?", "Really?"))
    logs = task(tmp_path, {"messages": [ask, say, again, say], "metadata": {"by": "me"}})
    assert (logs.prompts, logs.digest) == (turns.prompts, turns.digest)


def test_the_digest_and_the_seeds_depend_on_all_that_is_asked(tmp_path):
    rows = [
        TALK,
        {**TALK, "tools": []},
        {**TALK, "messages": TALK["messages"][1:]},
        SYSTEM,
        {"turns": ["Why?"]},
    ]
    assert len({task(tmp_path, row).digest for row in rows}) == len(rows)
    (asked,) = task(tmp_path, TALK).asked
    (other,) = task(tmp_path, rows[1]).asked
    assert len({prompt_seed(0, "mine", turns, i) for turns in (asked, other) for i in range(3)}) == 6
    assert json.loads(json.dumps(asked)) == asked


def test_a_frame_stands_round_the_first_user_turn(tmp_path):
    found = task(tmp_path, SYSTEM, frame="{prompt}\nIn one word.")
    assert found.prompts[0].messages[0]["content"] == "Be brief."
    assert found.prompts[0].turns == ("Why?\nIn one word.",)
    assert evaluation_texts([tmp_path / "mine.yaml"]) == ["Why?"]


def test_a_directory_of_prompts_may_hold_messages(tmp_path):
    (tmp_path / "agents.jsonl").write_text(json.dumps(TALK) + "\n" + json.dumps(SYSTEM) + "\n")
    found = load_task("agents", tasks_dir=tmp_path)
    assert [len(turns) for turns in found.asked] == [3, 1]
    # The question mark that all first turns end with may be a frame.
    assert evaluation_texts(["agents"], tmp_path) == ["weather in Paris", "thanks, and London?", "Why"]


def test_token_ids_are_refused_and_what_is_left_out_is_told(tmp_path, caplog):
    with pytest.raises(DeepSpecError, match=r"mine\.jsonl, prompt 1: token ids; a task asks in messages"):
        task(tmp_path, SYSTEM, {"input_ids": [5, 6], "loss_mask": [0, 1]})
    with caplog.at_level(logging.WARNING):
        task(tmp_path, {"messages": [{"role": "assistant", "content": "Hello!"}, *SYSTEM["messages"]]})
    assert "an assistant turn before the first user turn, left out 1 times" in caplog.text


def test_what_cannot_be_asked_is_refused_before_anything_is_decoded(tmp_path):
    found = task(tmp_path, {"turns": ["Why?"]}, SYSTEM)
    with pytest.raises(DeepSpecError, match=r"task mine, prompt 1: .*System role not supported"):
        check_prompts(FAMILIES["gemma"].target(), [found])
    target = FakeTarget()
    check_prompts(target, [found])
    target.max_length = 40
    with pytest.raises(DeepSpecError, match=r"task mine, prompt 1: \d+ tokens leave no room .*40 positions"):
        check_prompts(target, [found])
