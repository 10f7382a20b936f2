"""An engine's counts beside ours: the ratio, its verdict, and what is warned of."""

import json
from pathlib import Path

import numpy as np
import pytest

from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import Pair
from deepspec.serving import record
from deepspec.serving.llamacpp.record import LlamaCppRecord
from deepspec.serving.ours import Ours
from deepspec.serving.protocols import Answer, Counts, Prompt
from deepspec.serving.record import Measured, ServingRecord, check_target, compare, first_difference

PROMPTS = [Prompt("code" if i % 2 else "chat", "", [1, 2]) for i in range(6)]


def measured(served=6, own=6, plain_seconds=(1.0, 1.0), drafted_seconds=0.5, tokens=(7, 8, 9)):
    tokens = list(tokens)
    mine = Ours(tokens, tokens, Counts(10, 20, own, (own, 0)), Pair(1.0, 3, 0.4, 3))
    answer = Answer(tokens, drafted_seconds, 2, Counts(10, 20, served, (served, 0)))
    plain = [[Answer(tokens, seconds, 2)] * len(PROMPTS) for seconds in plain_seconds]
    return Measured(PROMPTS, [answer] * len(PROMPTS), plain, [mine] * len(PROMPTS))


def test_the_ratio_is_of_tokens_a_verification_bonus_included():
    found = compare(measured(served=2, own=10), "vllm").model_dump(mode="json")
    assert found["served"]["mean_accepted_length"] == pytest.approx(1.2)
    assert found["ours"]["mean_accepted_length"] == pytest.approx(2.0)
    assert found["ratio_accepted_length"] == pytest.approx(0.6)
    assert found["tasks"]["code"] == {"prompts": 3, "served": pytest.approx(1.2), "ours": pytest.approx(2.0)}


def test_less_than_ninety_five_percent_fails_and_says_what_to_check():
    (failure,) = compare(measured(served=5, own=10), "vllm").model_dump(mode="json")["failures"]
    assert "vllm accepts 1.50 tokens a verification where our engine accepts 2.00" in failure
    assert "layer ids" in failure and "docs/deploy.md" in failure and "\n" not in failure
    assert compare(measured(served=5, own=10), "vllm", gated=False).model_dump(mode="json")["failures"] == []
    assert compare(measured(served=96, own=100), "vllm").model_dump(mode="json")["failures"] == []


def test_speed_is_against_both_plain_runs():
    found = compare(measured(plain_seconds=(1.0, 3.0), drafted_seconds=0.5), "vllm").model_dump(mode="json")
    served = found["served"]
    assert served["plain_runs"] == [2.0, pytest.approx(2 / 3)]
    assert served["tokens_per_second_plain"] == pytest.approx(1.0)
    assert served["speedup"] == pytest.approx(4.0)
    assert served["speedup_ci95"] == pytest.approx([4.0, 4.0])
    assert any("other work on this machine" in warning for warning in found["warnings"])
    steady = compare(measured(), "vllm").model_dump(mode="json")
    assert not any("other work" in warning for warning in steady["warnings"])


def test_without_a_plain_server_there_is_no_speed_up():
    found = compare(measured(plain_seconds=()), "tgi").model_dump(mode="json")
    assert found["served"]["speedup"] is None and found["served"]["tokens_per_second"] == 4
    assert found["outputs"]["plain_vs_ours"] is None
    assert found["outputs"]["drafted_vs_ours"]["identical"] == 6


def test_first_differences_are_counted_in_tokens():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    work = measured()
    work.drafted[0] = Answer([7, 1, 9], 0.5, 2, work.drafted[0].counts)
    found = compare(work, "vllm").model_dump(mode="json")
    assert found["outputs"]["drafted_vs_plain"] == {"identical": 5, "prompts": 6, "first_differences": [1]}
    assert any("differ from its plain ones in 1 of 6" in warning for warning in found["warnings"])


def test_an_engine_that_never_drafted_is_an_error():
    work = measured()
    work.drafted = [Answer([7], 0.1, 0)] * len(PROMPTS)
    with pytest.raises(DeepSpecError, match="vllm verified no draft"):
        compare(work, "vllm").model_dump(mode="json")


def test_another_model_shows_in_the_first_tokens():
    work = measured()
    others = [Answer([8, 8], 0.1, 1)] * 4 + work.drafted[4:]
    with pytest.raises(DeepSpecError, match="4 of 6 answers begin with another token"):
        check_target(others, work.ours, "http://host")
    check_target([Answer([8, 8], 0.1, 1), *work.drafted[1:]], work.ours, "http://host")  # a near tie


def test_the_record_is_plain_json():
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (int, float, str, bool)

    assert plain(compare(measured(), "vllm").model_dump(mode="json"))
    assert not plain({"a": np.float64(1)}), "the check itself"
    assert record.SERVE_VERSION == "1"


COMMITTED = sorted((Path(__file__).parents[2] / "reports/serve").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_record_is_written_as_it_was_read(path, tmp_path):
    kind = LlamaCppRecord if "-llamacpp-" in path.name else ServingRecord
    kind.read(path).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_another_version_or_key_is_refused_by_name(tmp_path):
    made = json.loads(next(path for path in COMMITTED if "-vllm" in path.name).read_text())
    path = tmp_path / "x.json"
    path.write_text(json.dumps(made | {"serve_version": "0"}))
    with pytest.raises(
        DeepSpecError, match=r"x\.json: of serving version 0, not 1; run deepspec serve-check again"
    ):
        ServingRecord.read(path)
    path.write_text(json.dumps(made | {"speed": 1}))
    with pytest.raises(DeepSpecError, match=r"x\.json: not a serving record: speed: Extra inputs"):
        ServingRecord.read(path)
