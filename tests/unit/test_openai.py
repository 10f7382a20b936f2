"""The OpenAI engine against a real server on the loopback interface."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace

import httpx
import pytest

from deepspec import retrying
from deepspec.answers import openai
from deepspec.answers.generate import generate_data
from deepspec.answers.params import GenerateParams
from deepspec.answers.shards import Shard, Sink, read_work
from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt
from deepspec.messages.rows import read_row
from deepspec.progress import Progress
from tests.fake_target import FakeTarget

PROMPTS = [Prompt.of_turns(f"p{i}", "seed", (f"question {i}", "and then?")[: 1 + i % 2]) for i in range(8)]


class FakeServer(ThreadingHTTPServer):
    """Answers with what `reply(body, number of the request)` returns: a dict, or (status, headers, body)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.requests, self.headers, self.paths = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.now += 1
            server.most = max(server.most, server.now)
        reply = server.reply(body, number)
        with server.lock:
            server.now -= 1
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, json.dumps(reply))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        """Keeps the test's output clean."""


def completion(text, finish_reason="stop", **message):
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": finish_reason}]}


def polite(body, number):
    return completion(f"to {body['messages'][-1]['content']}")


@pytest.fixture
def serve():
    servers = []

    def start(reply=polite):
        server = FakeServer(reply)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(retrying.KEY_VARIABLE, raising=False)


@pytest.fixture
def nowhere():
    """An address at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def params(*urls, retries=3, concurrency=4, timeout_s=5, **settings):
    server = {"base_urls": urls, "model": "m", "retries": retries, "concurrency": concurrency}
    return GenerateParams(engine="openai", openai=server | {"timeout_s": timeout_s}, **settings)


def run(tmp_path, settings, prompts=PROMPTS, target=None):
    with Shard(tmp_path) as shard:
        sink = Sink(shard, Progress("test", len(prompts), shown=False), seed=7)
        openai.answer(target or FakeTarget(), prompts, settings, sink)
    return read_work(tmp_path)


def test_answers_become_rows_with_the_stop_token_appended(tmp_path, serve):
    target = FakeTarget()
    work = run(tmp_path, params(serve().url), target=target)
    assert set(work.rows) == {prompt.id for prompt in PROMPTS} and not work.failures
    (row,) = work.rows_of("p1")
    assert target.text(row["input_ids"]) == (
        "<|start|>user\nquestion 1<|end|>\n<|start|>assistant\nto question 1<|end|>\n"
        "<|start|>user\nand then?<|end|>\n<|start|>assistant\nto and then?<|end|>"
    )
    masked = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
    assert target.text(masked) == "to question 1<|end|>to and then?<|end|>"
    assert row["finish_reasons"] == ["stop", "stop"]


def test_the_request_carries_conversation_and_settings(tmp_path, serve):
    server = serve()
    settings = params(server.url, temperature=0.6, top_p=0.9, top_k=5, max_new_tokens=20)
    run(tmp_path, settings, PROMPTS[1:2])
    first, second = server.requests
    assert first["messages"] == [{"role": "user", "content": "question 1"}]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert {key: first[key] for key in ("model", "temperature", "top_p", "top_k", "max_tokens")} == {
        "model": "m",
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 20,
    }
    assert second["seed"] == first["seed"] + 1
    assert server.paths[0] == "/v1/chat/completions"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_base_url_may_end_in_v1_or_not(suffix):
    assert openai._endpoint(f"http://host:8000{suffix}") == "http://host:8000/v1/chat/completions"


def test_the_key_comes_from_the_environment(tmp_path, serve, monkeypatch):
    server = serve()
    run(tmp_path / "a", params(server.url), PROMPTS[:1])
    monkeypatch.setenv(retrying.KEY_VARIABLE, "secret")
    run(tmp_path / "b", params(server.url), PROMPTS[:1])
    assert [headers.get("authorization", headers.get("Authorization")) for headers in server.headers] == [
        None,
        "Bearer secret",
    ]


def test_errors_that_pass_are_tried_again(tmp_path, serve):
    """Every third request meets 500, 429 or a reply that breaks off."""
    bad = [
        (500, {}, "oops"),
        (429, {}, "slow down"),
        (200, {"Content-Length": "900", "Connection": "close"}, "{"),
    ]
    server = serve(lambda body, n: bad[n // 3 % 3] if n % 3 == 0 else polite(body, n))
    work = run(tmp_path, params(server.url, retries=8, timeout_s=1), PROMPTS)
    assert len(work.rows) == len(PROMPTS) and not work.failures
    assert len(server.requests) > 12


def test_retry_after_is_honoured(tmp_path, serve):
    times = []

    def reply(body, number):
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, "") if number == 0 else polite(body, number)

    run(tmp_path, params(serve(reply).url), PROMPTS[:1])
    assert times[1] - times[0] >= 0.4


def test_retry_after_may_be_a_date_or_nonsense():
    def wait(value):
        return retrying.retry_after_s(httpx.Response(429, headers={"Retry-After": value}))

    assert wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert wait("Fri, 31 Dec 9999 23:59:59 GMT") == retrying.LONGEST_RETRY_AFTER_S
    assert wait("soon") == wait("-3") == wait("nan") == 0


def test_waits_grow_and_are_spread():
    waits = [[retrying.wait_s(attempt, None) for _ in range(200)] for attempt in range(4)]
    assert len(set(waits[0])) > 100
    assert all(max(early) < 3 * min(early) * 1.01 for early in waits)
    assert all(sum(late) > 1.5 * sum(early) for early, late in pairwise(waits))


def test_a_request_that_keeps_failing_fails_its_row_alone(tmp_path, serve):
    def reply(body, number):
        return (503, {}, "") if "question 2" in str(body) else polite(body, number)

    server = serve(reply)
    work = run(tmp_path, params(server.url, retries=2))
    assert set(work.failures) == {"p2"}
    assert work.failures["p2"] == f"{server.url}/v1/chat/completions gave no answer in 3 tries: status 503"
    assert len(work.rows) == len(PROMPTS) - 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(None), "returned no text"),
        (completion("a", "content_filter"), "the answer ended with 'content_filter'"),
        (completion("a<|end|>b"), "a stop token stands inside the answer"),
        (completion("x" * 5000, "length"), "more than 512"),
        (completion("", "length"), "no such last token"),
        ({"error": "none"}, "not a chat completion"),
        ({"choices": [{"message": None, "finish_reason": "stop"}]}, "not a chat completion"),
        ((200, {}, "<html>"), "not JSON"),
        ((400, {}, "context\ntoo long"), r"refused the request \(status 400\): context too long"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_failure_with_its_reason(tmp_path, serve, reply, reason):
    bad = serve(
        lambda body, number: reply if body["messages"][0]["content"] == "question 0" else polite(body, 0)
    )
    work = run(tmp_path, params(bad.url), PROMPTS[:2])
    assert list(work.rows) == ["p1"]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(work.failures["p0"])


def test_a_parser_that_takes_out_what_the_template_does_not_show_stops_the_run_at_the_first_answer(
    tmp_path, serve
):
    server = serve(lambda body, number: completion("a", reasoning_content="hm"))
    with pytest.raises(DeepSpecError, match=r"took the reasoning out .* run the server without that parser"):
        run(tmp_path, params(server.url, concurrency=1))
    assert len(server.requests) == 1


def test_token_ids_are_asked_for_until_a_server_does_not_know_of_them(tmp_path, serve):
    def reply(body, number):
        if "return_token_ids" in body:
            return (400, {}, "unknown field: return_token_ids")
        return polite(body, number)

    server = serve(reply)
    work = run(tmp_path, params(server.url, concurrency=1))
    assert len(work.rows) == len(PROMPTS) and not work.failures
    assert ["return_token_ids" in body for body in server.requests[:3]] == [True, False, False]


def test_messages_tools_and_template_arguments_are_sent(tmp_path, serve):
    tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}
    row = {
        "system": "Be a pirate.",
        "prompt": "How is it?",
        "tools": [tool],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    server = serve(lambda body, number: completion("Fine."))
    run(tmp_path, params(server.url), [Prompt("p", "file", read_row(row).chat)], FakeTarget(language="en"))
    (body,) = server.requests
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["tools"] == [tool]
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "language": "en"}


def test_text_that_the_tokenizer_does_not_give_back_is_a_failure(tmp_path, serve):
    target = FakeTarget()
    tokenizer = target.tokenizer

    class Lossy(SimpleNamespace):
        def __call__(self, text, **flags):
            return tokenizer(text, **flags)

    target.tokenizer = Lossy(
        decode=lambda ids, **flags: tokenizer.decode(ids, **flags).lower(),
        apply_chat_template=tokenizer.apply_chat_template,
        eos_token_id=tokenizer.eos_token_id,
    )
    server = serve(lambda body, number: completion("Loud"))
    work = run(tmp_path, params(server.url), PROMPTS[:1], target)
    assert work.failures == {"p0": "the target's tokenizer does not give this answer's text back"}


def test_no_more_requests_are_in_flight_than_allowed_and_all_servers_share(tmp_path, serve):
    def slow(body, number):
        deadline = time.monotonic() + 20
        while min(server.most for server in servers) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        return polite(body, number)

    servers = [serve(slow), serve(slow)]
    prompts = [Prompt.of_turns(f"q{i}", "seed", ("hello",)) for i in range(24)]
    run(tmp_path, params(*(server.url for server in servers), concurrency=3), prompts)
    assert [server.most for server in servers] == [3, 3]
    assert sum(len(server.requests) for server in servers) == 24


def test_an_unreachable_server_is_one_clear_line(tmp_path, nowhere):
    with pytest.raises(DeepSpecError) as error:
        run(tmp_path, params(nowhere, retries=1))
    assert f"no answer from the OpenAI server at {nowhere}/v1/chat/completions" in str(error.value)
    assert "\n" not in str(error.value)
    assert not read_work(tmp_path).failures


def test_the_other_servers_take_over_from_one_that_is_unreachable(tmp_path, serve, nowhere):
    work = run(tmp_path, params(nowhere, serve().url, retries=1))
    assert len(work.rows) == len(PROMPTS) and not work.failures


def test_finished_conversations_survive_a_server_that_goes_away(tmp_path, serve):
    server = serve()
    run(tmp_path, params(server.url), PROMPTS[:5])
    server.shutdown()
    server.server_close()
    with pytest.raises(DeepSpecError, match="finished conversations are kept"):
        run(tmp_path, params(server.url, retries=0), PROMPTS[5:])
    assert len(read_work(tmp_path).rows) == 5


@pytest.mark.parametrize(("status", "hint"), [(401, "DEEPSPEC_OPENAI_KEY set"), (404, "no such model")])
def test_a_refusal_that_all_requests_would_meet_stops_the_run(tmp_path, serve, status, hint):
    server = serve(lambda body, number: (status, {}, "no such model"))
    with pytest.raises(DeepSpecError, match=f"status {status}.*{hint}"):
        run(tmp_path, params(server.url))
    assert not read_work(tmp_path).failures


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_urls": [], "model": "m"}, "base_urls is empty"),
        ({"base_urls": ["http://localhost"], "model": ""}, "model is empty"),
        ({"base_urls": ["localhost:8000"], "model": "m"}, "'localhost:8000' is not an address like"),
        ({"base_urls": ["http://host:port"], "model": "m"}, "is not an address: Invalid port"),
        ({"base_urls": ["http://host:99999"], "model": "m"}, "is not an address like"),
    ],
)
def test_settings_that_name_no_server_are_one_clear_line(tmp_path, settings, message):
    with pytest.raises(DeepSpecError, match=message):
        run(tmp_path, GenerateParams(engine="openai", openai=settings))


def test_the_stage_writes_the_data_set_with_this_engine(tmp_path, serve):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "source": "seed", "turns": ["hello"]}\n')
    settings = SimpleNamespace(seed=0, generate=params(serve().url))
    manifest = generate_data(FakeTarget(), settings, prompts, tmp_path / "distill", tmp_path / "work")
    assert (manifest["rows"], manifest["settings"]["engine"], manifest["settings"]["model"]) == (
        1,
        "openai",
        "m",
    )
