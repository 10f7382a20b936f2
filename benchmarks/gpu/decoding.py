"""Step 3: what a pass costs, and decoding with it, on a random 1.5B target and on a real one where it is given.

A pass is the target's forward, its logits and their largest, on the host, as a decoding round has it. The memory floor
is the time in which the weights and the cache of the context are read at the bandwidth of a copy. The random target's
draft is untrained: it shows what a round costs, and so at which τ it would pay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu import models
from benchmarks.gpu.clock import copy_bandwidth, host_share, median_seconds, now
from benchmarks.gpu.findings import Findings, Setting
from deepspec.commands.profile import weight_bytes
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.sampling import best
from deepspec.drafters.load import load_drafter
from deepspec.target.attention import ForwardPass, KVCache
from deepspec.target.model import Target, load_target

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
DRAFTS = ("dspark", "eagle3", "lookup")
STATIC = "transformers.generate, static cache"


def run(setting: Setting, findings: Findings) -> None:
    bandwidth = findings.piece(
        "bandwidth", lambda: {"bytes_per_second": copy_bandwidth(setting.device, setting.pick(4, 4096))}
    )["bytes_per_second"]
    sizes = setting.pick(models.TINY, models.LARGE)
    dtype = setting.pick("float32", "bfloat16")
    paths = {"random": models.make_target(setting.work / "random", sizes, dtype, setting.device)}
    if setting.target:
        paths[setting.target.name] = setting.target
    for name, path in paths.items():
        for graphs in setting.graphs:
            target = load_target(path, device=str(setting.device), graphs=graphs)
            way = f"{name}, {'graphs' if graphs else 'eager'}"
            findings.piece(f"passes, {way}", lambda t=target: passes(setting, t, bandwidth))
            for draft, drafter in drafters(setting, name, target).items():
                findings.piece(f"decoding, {way}, {draft}", lambda d=drafter, t=target: decode(setting, t, d))
            del target
        findings.piece(f"decoding, {name}, {STATIC}", lambda p=path: static_cache(setting, p))


def drafters(setting: Setting, name: str, target: Target) -> dict[str, Drafter | None]:
    """Plain decoding, untrained drafts, and the given one where this is its target."""
    found: dict[str, Drafter | None] = {"plain": None}
    for draft in DRAFTS:
        found[draft] = models.make_drafter(setting.work / f"{name}-{draft}", draft, target)
    if setting.draft and setting.target and name == setting.target.name:
        found[f"{setting.draft.name}, trained"] = load_drafter(setting.draft, target)
    return found


class Owner:
    """Keeps a target's cache in use."""


@torch.inference_mode()
def passes(setting: Setting, target: Target, bandwidth: float) -> dict[str, Any]:
    """Milliseconds, the host's share and the distance to the memory floor of a pass over 1 to 64 tokens."""
    context, repeats = setting.pick((48, 3), (512, 30))
    owner, widths = Owner(), setting.pick(WIDTHS[::3], WIDTHS)
    cache = target.cache(1, owner)
    cache.reserve(context + max(widths))
    _pass(target, cache, 0, context)
    floor = (weight_bytes(target) + _context_bytes(target, context)) / bandwidth
    rows = {}
    for width in widths:
        call = lambda width=width: _pass(target, cache, context, width)  # noqa: E731
        took = median_seconds(call, target.device, repeats)
        share = host_share(call, target.device, took)
        rows[str(width)] = {"ms": 1000 * took, "host_share": share, "over_floor": took / floor}
    return {
        "weight_bytes": weight_bytes(target),
        "context": context,
        "floor_ms": 1000 * floor,
        "widths": rows,
    }


def _pass(target: Target, cache: KVCache, start: int, width: int) -> None:
    ids = torch.randint(2, target.vocab_size, (1, width), device=target.device)
    positions = torch.arange(start, start + width, device=target.device)[None]
    step = ForwardPass(positions, cache=cache, starts=[start], counts=[width])
    best(target.logits(target.forward(ids, step)[0]))


def _context_bytes(target: Target, context: int) -> int:
    """Of the keys and values that a pass reads."""
    config = target.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * target.num_layers * config.num_key_value_heads * dim * context * target.dtype.itemsize


def decode(setting: Setting, target: Target, drafter: Drafter | None) -> dict[str, Any]:
    """One request at a time, greedily: tokens/s without the prefill, milliseconds a round, τ, the host's share."""
    tokens = setting.pick(12, 256)
    prompt = models.random_prompts(target, 1, 4)[0] * setting.pick(4, 16)

    def call(most: int = tokens):
        return generate(target, drafter, prompt, most)[0]

    call()  # kernels and graphs
    first = median_seconds(lambda: call(1), target.device, 3, untimed=1)
    began = now(target.device)
    answer = call()
    wall = now(target.device) - began
    decoding, rounds = max(wall - first, 1e-9), answer.stats.rounds
    return {
        "tokens": len(answer.tokens),
        "tokens_per_second": (len(answer.tokens) - 1) / decoding,
        "round_ms": 1000 * decoding / max(rounds - 1, 1),
        "tau": answer.stats.tau,
        "host_share": host_share(call, target.device, wall),
    }


@torch.inference_mode()
def static_cache(setting: Setting, path: Path) -> dict[str, Any]:
    """The same with Hugging Face's own loop, which compiles the model's forward on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    model = model.to(setting.device).eval()
    tokens, context = setting.pick(12, 256), setting.pick(16, 64)
    torch.manual_seed(2)
    ids = torch.randint(2, model.config.vocab_size, (1, context), device=setting.device)

    def call(most: int = tokens) -> torch.Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            cache_implementation="static",
        )

    call()
    first = median_seconds(lambda: call(1), setting.device, 3, untimed=1)
    wall = median_seconds(call, setting.device, 3, untimed=1)
    made = tokens - 1
    return {
        "tokens": tokens,
        "tokens_per_second": made / max(wall - first, 1e-9),
        "round_ms": 1000 * (wall - first) / made,
        "tau": 1.0,
        "host_share": host_share(call, setting.device, wall),
    }
