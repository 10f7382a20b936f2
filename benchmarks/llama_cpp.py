"""The llama.cpp side of `benchmarks/decode.py`: a process of its own that answers JSON lines.

It runs in llama.cpp's own virtual environment, so it imports nothing of DeepSpec, and is started isolated
(`python -I`): otherwise `import llama_cpp` would find this file.

    {"mode": "plain" | "lookup", "ids": [...], "max_new_tokens": 64, "stop_ids": [...]}
    {"tokens": [...], "passes": 64, "idle_cpu_s": 0.001}

`passes` counts the target's passes, the prompt's among them; `idle_cpu_s` is the CPU time of this process since its
last answer. Decoding is greedy, and nothing is kept from one request to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


class Model:
    """One loaded GGUF, with or without llama-cpp-python's own prompt lookup."""

    def __init__(self, path: str, threads: int, context: int, draft_tokens: int | None):
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        draft = LlamaPromptLookupDecoding(num_pred_tokens=draft_tokens) if draft_tokens else None
        self.llama = Llama(
            path, n_ctx=context, n_threads=threads, n_threads_batch=threads, draft_model=draft, verbose=False
        )
        self.evaluate = self.llama.eval
        self.llama.eval = self._counted
        self.passes = 0

    def _counted(self, tokens: list[int]) -> None:
        self.passes += 1
        self.evaluate(tokens)

    def decode(self, ids: list[int], max_new_tokens: int, stop_ids: list[int]) -> dict:
        self.llama.reset()  # else the prompt's cache of the last request would be taken over
        self.passes = 0
        tokens: list[int] = []
        for token in self.llama.generate(ids, temp=0.0):
            tokens.append(token)
            if len(tokens) == max_new_tokens or token in stop_ids:
                break
        return {"tokens": tokens, "passes": self.passes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--draft-tokens", type=int, required=True)
    flags = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints must not mix with the answers
    models = {
        "plain": Model(flags.gguf, flags.threads, flags.context, None),
        "lookup": Model(flags.gguf, flags.threads, flags.context, flags.draft_tokens),
    }
    print(json.dumps({"ready": True}), file=answers, flush=True)
    busy_until = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - busy_until
        ask = json.loads(line)
        answer = models[ask.pop("mode")].decode(**ask)
        busy_until = time.process_time()
        print(json.dumps(answer | {"idle_cpu_s": idle}), file=answers, flush=True)


if __name__ == "__main__":
    main()
