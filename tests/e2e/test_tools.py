"""The profile of conversations with tools, on a tiny target whose template shows tools and calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.chat_templates import HERMES_CALLS, chatml
from tests.e2e.clone import Clone, make_clone

pytestmark = pytest.mark.e2e
DRAFTER = "dspark"
TALK = {
    "messages": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "How warm is it in Oslo?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": '{"degrees": 3}'},
        {"role": "user", "content": "And in Quito?"},
    ],
    "tools": [{"name": "weather", "description": "Tell the weather.", "parameters": {}}],
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with the profile, made small, and a task of messages; the data's own answers are learnt."""
    clone = make_clone(tmp_path_factory.mktemp("clone"), "llama")
    root = clone.root
    shutil.copy(root / "params.tools.yaml", root / "params.yaml")
    (root / "data/smoke-target/chat_template.jinja").write_text(chatml("{{ m.content }}" + HERMES_CALLS))
    (root / "tasks").mkdir()
    (root / "tasks/agents.jsonl").write_text(json.dumps(TALK) + "\n")
    for key, value in {
        "target": {"source": "data/smoke-target", "dtype": "float32"},
        "generate": {"engine": "given", "given": {"answered_by": "another"}, "max_length": 2048},
        "drafters.dspark": {"type": "dspark", "layers": 1, "start": "random", "block_size": 3, "markov_rank": 8,
                            "draft_vocab_size": 128, "target_layer_ids": [0, 1]},
        "prompts.mix": {"tools": 1.0},
        "pipeline": [DRAFTER],
        "train.steps": 4,
        "train.max_length": 2048,
        "train.mixed_precision": "no",
        "validate.max_repetition": 1.0,
        "evaluate.tasks": ["agents"],
        "evaluate.tasks_dir": "tasks",
        "evaluate.throughput": None,
    }.items():  # fmt: skip
        clone.set(key, value)
    return clone


def test_tools_calls_and_results_go_from_prompts_to_the_report(clone: Clone):
    ran = clone.repro()
    assert {"target", "prompts", "generate", "validate", f"export@{DRAFTER}", "report"} <= set(ran)
    rows = pyarrow.parquet.read_table(clone.root / "data/distill/train.parquet").to_pylist()
    with_tools = [json.loads(row["chat"]) for row in rows if row.get("chat")]
    assert any(message.get("tool_calls") for chat in with_tools for message in chat["messages"])
    assert any(message["role"] == "tool" for chat in with_tools for message in chat["messages"])
    facts = clone.report("reports/validation.json")["facts"]
    assert facts["with tools"] != "0.0%" and facts["with a tool call"] != "0.0%"
    record = clone.report(f"reports/eval/{DRAFTER}.json")
    assert record["tasks"]["agents@T=0"]["lossless"] and record["summary"]["lossless"]
    longest = max(each["end"] for each in record["contexts"]["agents@T=0"])
    assert longest > 128, "tools and results are in the context"
    said = clone.report(f"reports/export/{DRAFTER}.json")["generation"]["contexts"]["sentence"]
    made = json.loads((clone.root / f"data/drafts/{DRAFTER}/deepspec.json").read_text())
    assert f"rows of up to {made['row_tokens']['longest']} tokens" in said
    card = next(Path(clone.root / f"data/exports/{DRAFTER}").glob("*/README.md")).read_text()
    assert said in card and "tokens of the longest row" in card
    assert "contexts.csv" in {path.name for path in (clone.root / "reports/plots").iterdir()}
