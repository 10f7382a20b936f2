"""Answers that the data has already: as the template writes them, with how likely the target finds them."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from deepspec.answers.generate import generate_data
from deepspec.answers.likelihood import Likelihood
from deepspec.answers.params import GenerateParams
from deepspec.decoding.engine import generate
from deepspec.errors import DeepSpecError
from deepspec.features.read import read_sequences
from deepspec.target.model import load_target
from tests.chat_templates import FAMILIES
from tests.fake_target import FakeTarget
from tests.tiny import cached_target

ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "Because."}
CALL = {"id": "c00000001", "type": "function", "function": {"name": "look", "arguments": {"place": "Paris"}}}


def run(tmp_path, target, *rows, **settings):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"p{i}", "source": "log", **row}) + "\n" for i, row in enumerate(rows)]
    path.write_text("".join(lines))
    params = SimpleNamespace(seed=0, generate=GenerateParams(**{"engine": "given"} | settings))
    manifest = generate_data(target, params, path, tmp_path / "distill", tmp_path / "work")
    table = Dataset.from_parquet(str(tmp_path / "distill/train.parquet"), cache_dir=str(tmp_path / "cache"))
    failures = (tmp_path / "distill/failures.jsonl").read_text().splitlines()
    return manifest, table.to_list(), [json.loads(line) for line in failures]


def test_recorded_turns_are_written_as_the_template_writes_them(tmp_path):
    target = FakeTarget()
    _, (row,), _ = run(tmp_path, target, {"messages": [ASK, SAY, {**ASK, "content": "Really?"}, SAY]})
    assert target.text(row["input_ids"]) == (
        "<|start|>user\nWhy?<|end|>\n<|start|>assistant\nBecause.<|end|>\n"
        "<|start|>user\nReally?<|end|>\n<|start|>assistant\nBecause.<|end|>"
    )
    masked = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
    assert target.text(masked) == "Because.<|end|>Because.<|end|>"
    assert row["finish_reasons"] == ["stop", "stop"] and row["engine"] == "given"


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.call and name != "deepseek"]
)
def test_recorded_tool_calls_are_what_the_family_writes(tmp_path, name):
    family = FAMILIES[name]
    target = family.target()
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]
    thought = {"reasoning_content": "Hm."} if name == "minimax" else {}  # its generations begin with one
    called = {"role": "assistant", "content": "", "tool_calls": [CALL], **thought}
    result = {"role": "tool", "tool_call_id": CALL["id"], "content": "18 C"}
    _, rows, failures = run(
        tmp_path, target, {"messages": [ASK, called, result, {**SAY, **thought}], "tools": tools}
    )
    assert not failures
    said = "".join(target.text(row["input_ids"]) for row in rows)
    assert "look" in said and "18 C" in said and "Because." in said
    assert sum(len(row["finish_reasons"]) for row in rows) == 2


def test_an_answer_that_was_cut_has_no_stop_token(tmp_path):
    target, cut = FAMILIES["qwen3"].target(), {"reply": {"finish_reason": "length"}}
    thought = {"role": "assistant", "content": "", "reasoning_content": "Let me caf\ufffd"}
    _, rows, failures = run(
        tmp_path,
        target,
        {"messages": [ASK, SAY], **cut},
        {"messages": [ASK, thought], **cut},
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}], **cut},
        {"messages": [ASK, SAY], "reply": {"finish_reason": "content_filter"}},
    )
    said = [
        target.text([i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]) for row in rows
    ]
    assert said == ["<think>\n\n</think>\n\nBecause.", "<think>\nLet me caf"]
    assert [row["finish_reasons"] for row in rows] == [["length"], ["length"]]
    assert [failure["reason"] for failure in failures] == [
        "the answer was cut short where its text does not tell the tokens",
        "the answer ended with 'content_filter'",
    ]


def test_ids_that_a_log_has_are_taken_where_its_prompt_is_ours(tmp_path):
    target = FakeTarget()
    asked = target.chat_ids([ASK])
    sampled = [*target.ids("Be"), *target.ids("cause.")]
    log = {"messages": [ASK, SAY], "reply": {"token_ids": sampled, "prompt_token_ids": asked}}
    other = {"messages": [ASK, SAY], "reply": {"token_ids": sampled, "prompt_token_ids": asked[1:]}}
    _, (row,), (failure,) = run(tmp_path, target, log, other)
    assert row["input_ids"] == [*asked, *sampled, target.end]
    assert sum(row["loss_mask"]) == len(sampled) + 1
    assert failure["id"] == "p1" and failure["reason"].startswith("the log's ids of the prompt are not those")


def test_a_template_that_moves_the_system_prompt_behind_an_answer_is_no_obstacle(tmp_path):
    target = FAMILIES["nemo"].target()
    messages = [{"role": "system", "content": "Be kind."}, ASK, SAY, {**ASK, "content": "Really?"}, SAY]
    _, rows, failures = run(tmp_path, target, {"messages": messages})
    assert not failures and [target.text(row["input_ids"]) for row in rows] == [
        "<s>[INST]Be kind.\n\nWhy?[/INST]Because.</s>",
        "<s>[INST]Why?[/INST]Because.</s>[INST]Be kind.\n\nReally?[/INST]Because.</s>",
    ]


def test_a_row_without_answers_is_a_failure_and_a_last_turn_without_one_an_ending(tmp_path):
    manifest, rows, failures = run(tmp_path, FakeTarget(), {"turns": ["Why?"]}, {"messages": [ASK, SAY, ASK]})
    assert failures == [{"id": "p0", "reason": "the data has no answer to its first turn"}]
    assert len(rows) == 1 and manifest["endings"] == {"the last turn has no answer": 1}
    assert manifest["failure_reasons"] == {"the data has no answer to its first turn": 1}


def test_token_ids_are_taken_as_they_are(tmp_path):
    target = FakeTarget()
    ids = [*target.ids("a question"), *target.ids("an answer"), target.end]
    mask = [0] * 10 + [1] * 10
    _, (row,), _ = run(tmp_path, target, {"input_ids": ids, "loss_mask": mask})
    assert (row["input_ids"], row["loss_mask"], row["finish_reasons"]) == (ids, mask, ["stop"])
    (sequence,), _ = read_sequences(tmp_path / "distill", 64, "answer")
    assert (sequence.ids, sequence.learnt) == (ids, mask)


def test_token_ids_of_another_vocabulary_or_beyond_the_length_are_failures(tmp_path):
    rows = [
        {"input_ids": [1, 99999], "loss_mask": [0, 1]},
        {"input_ids": [5] * 40, "loss_mask": [0] + [1] * 39},
    ]
    _, _, failures = run(tmp_path, FakeTarget(), *rows, {"messages": [ASK, SAY]}, max_length=39 + 16)
    assert "token 99999 is none of the target's" in failures[0]["reason"] and len(failures) == 1
    _, _, failures = run(
        tmp_path, FakeTarget(), *rows, {"messages": [ASK, SAY]}, max_length=60, temperature=0.1
    )
    assert len(failures) == 1


def test_token_ids_are_refused_by_engines_that_ask(tmp_path):
    with pytest.raises(DeepSpecError, match=r"1 of 1 prompts are token ids .*set generate.engine to given"):
        run(tmp_path, FakeTarget(), {"input_ids": [5, 6], "loss_mask": [0, 1]}, engine="local")


def test_the_target_s_own_words_surprise_it_less_than_others():
    target = load_target(cached_target())
    prompt = target.chat_ids([ASK])
    likelihood = Likelihood(target)
    own = [out.tokens for out in generate(target, None, [prompt] * 8, 40, temperature=1.0, seed=3)]
    mean = sum(likelihood.of([*prompt, *one], [0] * len(prompt) + [1] * len(one))[1] for one in own) / len(
        own
    )
    other = target.tokenizer("The function starts with the first number.", add_special_tokens=False)[
        "input_ids"
    ]
    strange = likelihood.of([*prompt, *other], [0] * len(prompt) + [1] * len(other))[1]
    assert abs(mean) < 0.15 and strange < -0.3
