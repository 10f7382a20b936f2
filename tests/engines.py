"""A serving engine played on the loopback interface: vLLM, SGLang, TGI or llama.cpp, in replies of their shapes.

Its draft is always right: each verification commits `accepted` draft tokens and one more, whatever is asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Continue = Callable[[list[int], int], list[int]]  # prompt ids, most new tokens → tokens


class FakeEngine(ThreadingHTTPServer):
    """Serves until the `with` block is left. `encode` is what TGI makes of a text."""

    daemon_threads = True

    def __init__(
        self,
        kind: str,
        continuation: Continue,
        accepted: int | None = 2,
        drafted: int = 2,
        encode: Callable[[str], list[int]] | None = None,
        metrics: bool = True,
        states: Callable[[list[int]], str] | None = None,
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind, self.continuation, self.encode, self.metrics = kind, continuation, encode, metrics
        self.accepted, self.drafted = accepted, drafted  # accepted None: no draft is served
        self.states = states  # writes the states of token ids, and names the file
        self.requests: list[dict[str, Any]] = []
        self.done = self.rounds = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FakeEngine:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def decode(self, ids: list[int], most: int) -> tuple[list[int], int]:
        """Tokens, and how many verifications they took after the prompt's own token."""
        tokens = self.continuation(ids, most)
        rounds = -(-(len(tokens) - 1) // (1 + self.accepted)) if self.accepted is not None else 0
        self.done, self.rounds = self.done + 1, self.rounds + rounds
        return tokens, rounds

    def get(self, path: str) -> str | dict | None:
        return getattr(self, f"_{self.kind}_get")(path)

    def post(self, path: str, body: dict) -> dict | None:
        self.requests.append(body)
        return getattr(self, f"_{self.kind}_post")(path, body)

    def _vllm_get(self, path: str) -> str | dict | None:
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "served", "object": "model", "root": "/models/x"}]}
        return vllm_metrics(self) if path == "/metrics" else None

    def _vllm_post(self, path: str, body: dict) -> dict | None:
        if path != "/v1/completions":
            return None
        tokens, _ = self.decode(body["prompt"], body["max_tokens"])
        ended = tokens[-1] in body.get("stop_token_ids", ())
        reason = (
            {"finish_reason": "stop", "stop_reason": tokens[-1]} if ended else {"finish_reason": "length"}
        )
        choice = {"index": 0, "text": "...", "token_ids": tokens, "prompt_token_ids": body["prompt"]} | reason
        if "logprobs" in body:
            choice["logprobs"] = {"top_logprobs": [{"a": -0.7, "b": -0.8}]}
        reply = {
            "object": "text_completion",
            "choices": [choice],
            "usage": {"completion_tokens": len(tokens)},
        }
        if self.states:
            reply["kv_transfer_params"] = {"hidden_states_path": self.states(body["prompt"])}
        return reply

    def _sglang_get(self, path: str) -> dict | None:
        return {"version": "0.5.15", "speculative_num_steps": 2} if path == "/get_server_info" else None

    def _sglang_post(self, path: str, body: dict) -> dict | None:
        if path != "/generate":
            return None
        tokens, rounds = self.decode(body["input_ids"], body["sampling_params"]["max_new_tokens"])
        meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": len(tokens), "e2e_latency": 0.5}
        if self.accepted is not None:
            meta |= {
                "spec_verify_ct": rounds,
                "spec_num_correct_drafts": rounds * self.accepted,
                "spec_num_proposed_drafts": rounds * self.drafted,
                "spec_correct_drafts_histogram": [0] * self.accepted + [rounds],
            }
        return {"text": "...", "output_ids": tokens, "meta_info": meta}

    def _tgi_get(self, path: str) -> str | dict | None:
        if path == "/info":
            return {"model_id": "target", "version": "3.3.6"}
        if path != "/metrics" or not self.metrics:
            return "" if path == "/metrics" else None
        passes = self.rounds + self.done  # a prompt's own pass gains nothing
        return (
            "# TYPE tgi_request_skipped_tokens histogram\n"
            f'tgi_request_skipped_tokens_bucket{{le="1"}} {passes}\n'
            f"tgi_request_skipped_tokens_sum {self.rounds * (self.accepted or 0)}\n"
            f"tgi_request_skipped_tokens_count {passes}\n"
        )

    def _tgi_post(self, path: str, body: dict) -> dict | None:
        if path != "/generate":
            return None
        ids = self.encode(body["inputs"])
        tokens, _ = self.decode(ids, body["parameters"]["max_new_tokens"])
        details = {
            "finish_reason": "length",
            "generated_tokens": len(tokens),
            "prefill": [{"id": i, "text": "", "logprob": None} for i in ids],
            "tokens": [{"id": i, "text": "", "logprob": -0.1, "special": False} for i in tokens],
        }
        return {"generated_text": "...", "details": details}

    def _llamacpp_get(self, path: str) -> dict | None:
        return {"build_info": "b11549"} if path == "/props" else None

    def _llamacpp_post(self, path: str, body: dict) -> str | dict | None:
        if path != "/completion":
            return None
        tokens, _ = self.decode(body["prompt"], body["n_predict"])
        if not body["stream"]:
            return {"tokens": tokens, "content": "..."}
        return llamacpp_stream(self, tokens)


def llamacpp_stream(engine: FakeEngine, tokens: list[int]) -> str:
    """Events of a streamed answer: each token with the time, drafted and accepted tokens so far; 10 ms a round."""
    events = []
    rounds = left = 0
    for i, token in enumerate(tokens):
        if i and not left:
            rounds, left = rounds + 1, (engine.accepted or 0) + 1
        left -= bool(i)
        timings = {"predicted_n": i + 1, "predicted_ms": 10.0 * rounds}
        if engine.accepted is not None:
            timings |= {"draft_n": rounds * engine.drafted, "draft_n_accepted": rounds * engine.accepted}
        events.append({"content": "...", "tokens": [token], "stop": False, "timings": timings})
    events.append({"content": "", "tokens": [], "stop": True, "timings": events[-1]["timings"]})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def vllm_metrics(engine: FakeEngine) -> str:
    """The lines of /metrics that matter, with some that do not."""
    label = 'engine="0",model_name="served"'
    lines = ["# HELP vllm:num_requests_running Number of requests.", "process_open_fds 35.0"]
    if engine.metrics:
        lines += [
            f"vllm:request_decode_time_seconds_count{{{label}}} {engine.done}.0",
            f"vllm:request_decode_time_seconds_sum{{{label}}} {0.25 * engine.done}",
        ]
    if engine.accepted is not None:
        spec = "vllm:spec_decode_num_"
        lines += [
            f"{spec}drafts_total{{{label}}} {engine.rounds}.0",
            f"{spec}draft_tokens_total{{{label}}} {engine.rounds * engine.drafted}.0",
            f"{spec}accepted_tokens_total{{{label}}} {engine.rounds * engine.accepted}.0",
            f"{spec}drafts_created{{{label}}} 1.79e+09",
        ]
        lines += [
            f'{spec}accepted_tokens_per_pos_total{{{label},position="{i}"}} {engine.rounds * (i < engine.accepted)}.0'
            for i in range(engine.drafted)
        ]
    return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply(self.server.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._reply(self.server.post(self.path, body))

    def _reply(self, content: str | dict | None) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("x-inference-time", "500")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keeps the test's output clean."""
