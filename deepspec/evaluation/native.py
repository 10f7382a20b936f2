"""The baseline beside our own: plain greedy decoding by `transformers.generate`, same machine and dtype."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 32


def native_tokens_per_second(
    target_dir: str | Path, dtype: Any, device: Any, prompts: dict[str, list[int]]
) -> dict[str, float]:
    """Decoded tokens per second for each prompt, prefill left out as in `benchmark.py`.

    The decode time is that of 1 + NEW_TOKENS tokens less that of the first alone.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target_dir, dtype=dtype).to(device).eval()
    _seconds(model, next(iter(prompts.values())), 1 + NEW_TOKENS)  # warm-up
    rates = {}
    for name, ids in prompts.items():
        decoding = min(_seconds(model, ids, 1 + NEW_TOKENS) for _ in range(2)) - _seconds(model, ids, 1)
        if decoding > 0:  # a tiny model's difference can drown in noise
            rates[name] = NEW_TOKENS / decoding
    return rates


def _seconds(model: Any, prompt_ids: list[int], new_tokens: int) -> float:
    ids = torch.tensor([prompt_ids], device=model.device)  # [1, prompt]
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        temperature=None,
        top_p=None,
        top_k=None,
    ).cpu()
    return time.perf_counter() - start
