"""What engines tell of a request, read from recorded replies and metrics."""

import math

import pytest

from deepspec.errors import DeepSpecError
from deepspec.serving.clients import CLIENTS
from deepspec.serving.protocols import VLLM, Counts, Prompt, SGLang, samples, total
from tests.engines import FakeEngine

PROMPT = Prompt("task", "a text", [5, 6, 7])
METRICS = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a \\"b\\" {c}"} 4.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="d"} 1e+01
vllm:spec_decode_num_drafts_created{engine="0",model_name="d"} 1.7956104095474486e+09
plain 7
"""


def count(ids, most):
    return list(range(100, 100 + most))


def encode(text):
    return PROMPT.ids


def test_metrics_are_read_with_their_labels_and_summed():
    assert total(METRICS, "vllm:spec_decode_num_drafts_total") == 14
    assert total(METRICS, "plain") == 7
    assert total(METRICS, "vllm:spec_decode_num_drafts") == 0, "a prefix of a name is another name"
    labels, value = samples(METRICS, "vllm:spec_decode_num_drafts_total")[0]
    assert labels["engine"] == "0" and value == 4


def test_acceptance_by_position_is_of_the_drafts_that_got_there():
    counts = Counts(drafts=8, drafted=24, accepted=11, by_position=(6, 3, 2))
    assert counts.accept_rate_by_position == [6 / 8, 3 / 6, 2 / 3]
    assert counts.mean_accepted_length == 1 + 11 / 8
    assert Counts(2, 4, 0, (0, 0)).accept_rate_by_position == [0, None]
    assert Counts().mean_accepted_length is None


def test_counts_add_up_whatever_their_lengths():
    assert Counts(1, 2, 1, (1,)) + Counts(1, 3, 2, (1, 1)) == Counts(2, 5, 3, (2, 1))
    assert Counts(5, 9, 3, (2, 1)) + -Counts(5, 9, 3, (2, 1)) == Counts(0, 0, 0, (0, 0))


@pytest.mark.parametrize("kind", CLIENTS)
def test_an_engine_says_how_many_draft_tokens_stood_in_this_request(kind):
    with FakeEngine(kind, count, accepted=2, drafted=3, encode=encode) as engine:
        client = CLIENTS[kind](engine.url)
        assert client.version()
        client.answer(PROMPT, 16, False)  # an earlier request does not count
        answer = client.answer(PROMPT, 10, True)
    assert answer.tokens == count([], 10)
    assert (answer.counts.drafts, answer.counts.accepted) == (3, 6)  # 1 + 3 · (2 + 1) tokens
    assert answer.counts.mean_accepted_length == 3
    if kind != "tgi":
        assert answer.counts.accept_rate_by_position[:2] == [1, 1]
        assert answer.counts.drafted == 9
    seconds, timed = {"vllm": (0.25, 9), "sglang": (0.5, 10), "tgi": (0.5, 10), "llamacpp": (0.03, 9)}[kind]
    assert math.isclose(answer.seconds, seconds) and answer.timed_tokens == timed


@pytest.mark.parametrize("kind", ["vllm", "sglang", "tgi"])
def test_an_engine_is_asked_greedily_and_for_no_more_than_so_many_tokens(kind):
    with FakeEngine(kind, count, encode=encode) as engine:
        CLIENTS[kind](engine.url, stop_ids={2, 1}).answer(PROMPT, 4, True)
        (body,) = engine.requests
    if kind == "tgi":
        assert body["parameters"]["do_sample"] is False and body["parameters"]["max_new_tokens"] == 4
        assert body["inputs"] == PROMPT.text
    else:
        asked = body.get("sampling_params", body)
        assert asked["temperature"] == 0 and asked["stop_token_ids"] == [1, 2]
        assert body.get("input_ids", body.get("prompt")) == PROMPT.ids


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_without_a_draft_is_named(kind):
    with FakeEngine(kind, count, accepted=None) as engine:
        client = CLIENTS[kind](engine.url)
        assert client.answer(PROMPT, 4, False).counts == Counts()
        with pytest.raises(DeepSpecError, match="serves without a draft; start it with --speculative"):
            client.answer(PROMPT, 4, True)


def test_metrics_that_do_not_count_are_named(monkeypatch):
    monkeypatch.setattr("deepspec.serving.protocols.time.sleep", lambda _: None)
    with (
        FakeEngine("vllm", count, metrics=False) as engine,
        pytest.raises(DeepSpecError, match="start it without --disable-log-stats"),
    ):
        VLLM(engine.url).answer(PROMPT, 4, True)
    with (
        FakeEngine("tgi", count, encode=encode, metrics=False) as engine,
        pytest.raises(DeepSpecError, match="start it with --speculate"),
    ):
        CLIENTS["tgi"](engine.url).answer(PROMPT, 4, True)


def test_tgi_that_reads_other_tokens_is_refused():
    with (
        FakeEngine("tgi", count, encode=lambda text: [1, *PROMPT.ids]) as engine,
        pytest.raises(DeepSpecError, match="reads the prompt as 4 tokens and the target as 3"),
    ):
        CLIENTS["tgi"](engine.url).answer(PROMPT, 4, True)


def test_older_sglang_that_counts_verifications_alone_is_understood(monkeypatch):
    meta = {"spec_verify_ct": 3, "completion_tokens": 10}
    assert SGLang("http://127.0.0.1")._counts(meta) == Counts(3, 0, 6)


def test_nobody_there_another_engine_and_a_bad_address_are_told_apart():
    with FakeEngine("sglang", count) as engine:
        url = engine.url
        with pytest.raises(DeepSpecError, match="no such page; is vllm served there"):
            VLLM(url).version()
    with pytest.raises(DeepSpecError, match="no answer from vllm"):
        VLLM(url).version()
    with pytest.raises(DeepSpecError, match=r"no answer from vllm|not an address"):
        VLLM("localhost").version()
