"""The baseline beside our own: plain greedy decoding by `transformers.generate`, same machine and dtype."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepspec.evaluation.timing import Answering, FirstToken, timed, warm_up
from deepspec.target.source import load_model, moved

NEW_TOKENS = 16


def native_tokens_per_second(
    target_dir: str | Path, dtype: torch.dtype, device: torch.device, prompts: dict[str, list[int]]
) -> dict[str, float]:
    """Return decoded tokens per second for each prompt, the better of two runs (see `timing.py`).

    The decode time is that of 1 + NEW_TOKENS tokens less that of the first alone.
    """
    model = moved(load_model(str(target_dir), dtype=dtype), str(device), str(target_dir))
    answer = partial(_answer, model)
    first_token = FirstToken(lambda ids: answer(ids, 1))
    runtime = Answering(answer, 1 + NEW_TOKENS, first_token)
    warm_up([runtime], next(iter(prompts.values())))
    rates = {}
    for name, ids in prompts.items():
        first_token.seconds(ids)  # before the runs: it makes the kernels for this length
        decoding = min(timed(runtime, ids)[1] for _ in range(2))
        if decoding > 0:  # a tiny model's difference can drown in noise
            rates[name] = NEW_TOKENS / decoding
    return rates


def _answer(model: Any, prompt_ids: list[int], new_tokens: int) -> torch.Tensor:
    ids = torch.tensor([prompt_ids], device=model.device)  # [1, prompt]
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        temperature=None,
        top_p=None,
        top_k=None,
    ).cpu()
