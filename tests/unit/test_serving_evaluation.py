"""Drafts measured in vLLM itself, into the record that every evaluation writes."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.params import EvaluateParams
from deepspec.evaluation.record import Record
from deepspec.serving import evaluation
from deepspec.serving.evaluation import Engine, evaluate_served, rounds
from deepspec.serving.protocols import Answer, Counts
from deepspec.target.ends import load_ends
from tests.engines import FakeEngine
from tests.tiny import cached_target, make_network

PARAMS = EvaluateParams(
    tasks=["word_problems", "conversations"], temperatures=[0.0, 1.0], prompts_per_task=2, max_new_tokens=13
)


def told(ids, most):
    return [5 + (len(ids) + i) % 7 for i in range(most)]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A draft, and a vLLM that says `told`; `started` has the ways in which it was started, `other` a way's answers."""
    monkeypatch.chdir(tmp_path)
    ends = load_ends(cached_target("llama"))
    network = make_network(ends, "eagle3", block_size=2, target_layer_ids=[0, 1, 2])
    write_drafter(tmp_path / "eagle3", network.description(), stored_weights(network), ends, {})
    found = SimpleNamespace(ends=ends, started=[], other={}, drafts={"eagle3": tmp_path / "eagle3"})

    @contextmanager
    def start(name, speculative, longest):
        found.started.append((name, speculative))
        say = found.other.get(name, told)
        with FakeEngine("vllm", say, accepted=2 if speculative else None) as engine:
            yield engine.url

    found.engine = Engine("0.32.0", start)
    return found


def measure(served) -> Record:
    return evaluate_served(served.drafts, served.ends, PARAMS, 0, served.engine)["eagle3"].record


def test_the_record_has_what_vllm_counted_and_says_so(served, tmp_path):
    record = measure(served)
    assert record.engine == "vllm 0.32.0" and record.summary.lossless
    assert record.tasks.keys() == {
        f"{task}@T={t}" for task in ("word_problems", "conversations") for t in (0, 1)
    }
    entry = record.tasks["conversations@T=0"]
    assert entry.tau == pytest.approx(3.0) and entry.accept_rate_by_position == [1.0, 1.0]
    assert entry.speedup == pytest.approx(1.0)  # the fake takes as long for every request
    assert entry.draft_ms is None and entry.tau_by_output_position == [] and record.contexts is None
    assert set(entry.beside) == {"lookup"}
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == record
    assert [name for name, _ in served.started] == ["plain", "lookup", "draft-eagle3", "plain"]
    assert served.started[1][1]["method"] == "ngram" and served.started[2][1]["method"] == "eagle3"


def test_a_killed_evaluation_goes_on_with_the_next_way(served):
    served.other["draft-eagle3"] = None  # no answer
    with pytest.raises(DeepSpecError):
        measure(served)
    served.other.clear()
    served.started.clear()
    measure(served)
    assert [name for name, _ in served.started] == ["draft-eagle3", "plain"]


def test_another_greedy_token_takes_the_speed_up(served):
    served.other["draft-eagle3"] = lambda ids, most: [*told(ids, most)[:-1], 4]
    record = measure(served)
    assert not record.summary.lossless and record.summary.speedup is None
    assert record.tasks["word_problems@T=0"].ties == 0
    assert "not_lossless" in {warning.name for warning in record.warnings}


def test_two_tokens_that_a_dtype_cannot_tell_apart_are_a_tie(served, monkeypatch):
    monkeypatch.setitem(evaluation.TIES, "float32", 0.2)
    served.other["draft-eagle3"] = lambda ids, most: [*told(ids, most)[:-1], 4]
    record = measure(served)
    assert record.summary.lossless and record.tasks["word_problems@T=0"].ties == 2


def test_greedy_answers_are_needed(served):
    with pytest.raises(DeepSpecError, match=r"evaluate\.temperatures needs 0"):
        evaluate_served(
            served.drafts, served.ends, PARAMS.model_copy(update={"temperatures": [1.0]}), 0, served.engine
        )


def test_rounds_come_from_an_engines_counts():
    counts = Counts(drafts=4, drafted=12, accepted=6, by_position=(3, 2, 1))
    accepted, drafted = rounds(Answer(list(range(13)), 1.0, 12, counts))
    assert accepted == [3, 2, 1, 0, 0, 0] and drafted == [3, 3, 3, 3, 0, 0]
    assert rounds(Answer([1, 2, 3], 1.0, 2)) == ([0, 0], [0, 0])
