"""One side of `benchmarks/commits.py`: the target of whatever commit is on PYTHONPATH, timed a line at a time.

Asked on stdin by {"measure": "pass", "tokens": 8, "repeats": 20} or {"measure": "plain" | "lookup", "prompt": 3,
"tokens": 64, "repeats": 1}, it answers with {"seconds": [...], "tokens": [...]}: of each repeat, and what was written.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import torch

PLACES = {  # where commits have it, the newest first
    "load_target": ("deepspec.target.model", "deepspec.target"),
    "ForwardPass": ("deepspec.target.attention", "deepspec.attention:Step"),
    "LookupDrafter": ("deepspec.drafters.algorithms.lookup", "deepspec.drafters.lookup"),
}
PROMPTS = [
    "Write a function that returns the largest number of a list, and explain how it works.",
    "Tom has 12 apples. He gives a third of them to his sister and eats two. How many are left?",
    "Give me a plan for a week of exercise for somebody who sits at a desk all day.",
    "Write a Python function that counts the vowels of a string, then one that counts the consonants of a string.",
]


def found(name: str) -> Any:
    """Return an object of the commit at hand, wherever it has it."""
    for place in PLACES[name]:
        module, _, other = place.partition(":")
        try:
            return getattr(importlib.import_module(module), other or name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this commit has no {name} in {', '.join(PLACES[name])}")


class Bench:
    """A target with what is measured of it."""

    def __init__(self, directory: str, context: int):
        from deepspec.decoding.engine import generate

        self.generate = generate
        self.make_pass = found("ForwardPass")
        self.target = found("load_target")(directory, device="cpu")
        self.lookup = found("LookupDrafter")(block_size=10, min_match=2)
        self.prompts = [self.target.chat_ids([{"role": "user", "content": text}]) for text in PROMPTS]
        self.cache = self.target.cache(1, self)
        self.cache.reserve(context + 64)
        self.context = context
        self.ids = torch.randint(
            100, self.target.vocab_size, (1, context + 64), generator=torch.Generator().manual_seed(0)
        )
        self.pass_over(0, context)

    @torch.inference_mode()
    def pass_over(self, start: int, count: int) -> torch.Tensor:
        """Run the target over so many tokens, its head included; logits [1, count, vocab]."""
        positions = torch.arange(start, start + count)[None]
        step = self.make_pass(positions, cache=self.cache, starts=[start], counts=[count])
        hidden = self.target.forward(self.ids[:, start : start + count], step)
        return self.target.logits(hidden)

    def answer(self, ask: dict[str, Any]) -> dict[str, list]:
        """Return seconds of each repeat, and the tokens that were written (of a pass, the likeliest ones)."""
        seconds, tokens = [], []
        for _ in range(ask["repeats"]):
            began = time.perf_counter()
            if ask["measure"] == "pass":
                tokens = self.pass_over(self.context, ask["tokens"])
            else:
                drafter = self.lookup if ask["measure"] == "lookup" else None
                prompt = self.prompts[ask["prompt"] % len(self.prompts)]
                tokens = self.generate(self.target, drafter, prompt, max_new_tokens=ask["tokens"])[0].tokens
            seconds.append(time.perf_counter() - began)
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.argmax(-1)[0].tolist()
        return {"seconds": seconds, "tokens": tokens}


def main() -> None:
    directory, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    bench = Bench(directory, context)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(bench.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
