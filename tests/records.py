"""Made-up evaluation records with every section, for tests of what is made of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from deepspec.evaluation.record import EVAL_VERSION, task_key
from deepspec.report.inputs import Inputs, load_inputs

TASKS = ("sums", "talk")
PROMPTS = 12  # of a task
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>"


def figures(speedup: float | None, tau: float = 2.5) -> dict:
    """What a record says of every way of decoding."""
    return {
        "rounds": 100,
        "tau": tau,
        "tau_ci95": [tau - 0.2, tau + 0.2],
        "accept_rate_by_position": [0.8, 0.5],
        "reached_by_position": [100, 80],
        "tokens_per_second": 50.0,
        "speedup": speedup,
        "speedup_ci95": None if speedup is None else [speedup - 0.1, speedup + 0.1],
        "draft_ms": 3.0,
        "verify_ms": 25.0,
        "host_ms": 0.2,
        "lossless": speedup is not None,
    }


def entry(temperature: float, speedup: float | None, ties: int = 0) -> dict:
    ratio = {"ratio": speedup and speedup / 1.2, "ratio_ci95": speedup and [speedup / 1.3, speedup / 1.1]}
    return {
        "category": "math",
        "task_version": "1",
        "source": "made up",
        "prompts_digest": "p0",
        "temperature": temperature,
        "prompts": 8,
        "new_tokens": 250,
        **figures(speedup),
        "tau_by_output_position": [
            {"start": start, "end": start + 16, "rounds": 20, "tau": 2.5 - start / 64}
            for start in (0, 16, 32)
        ],
        "baseline_tokens_per_second": 25.0,
        "ties": ties,
        "lossless_checked": {"prompts": 4, "tokens": 192},
        "output_hashes": [f"output {index}" for index in range(PROMPTS)],
        "beside": {"lookup": figures(1.2, 1.3) | ratio, "fixed": figures(speedup and speedup - 0.1) | ratio},
    }


def record(name: str = "good", speedup: float | None = 2.0, trained: bool = True, **changes) -> dict:
    mean = {key: value for key, value in figures(speedup).items() if key.startswith(("tau", "speedup"))}
    beside = {way: {**mean, "ratio": 1.1, "ratio_ci95": [1.0, 1.2]} for way in ("lookup", "fixed")}
    by_temperature = {t: {**mean, "beside": beside} for t in ("0", "1")}
    rates = {"accept_rate_by_position": [0.7, 0.6, 0.5], "reached_by_position": [90, 60, 40]}
    blocks = {
        mode: {task: {"blocks": 90, "tau": 2.0, **rates} for task in TASKS} for mode in ("greedy", "sampled")
    }
    bins = [
        {"low": i / 5, "high": (i + 1) / 5, "count": 20, "predicted": i / 5 + 0.1, "observed": i / 5}
        for i in range(5)
    ]
    thresholds = [
        {"threshold": i / 4, "accepted": 80 - 10 * i, "rejected": 60 - 15 * i, "acceptance_rate": 0.6}
        for i in range(4)
    ]
    quality = {"blocks": 90, "ece": {"before": 0.09, "after": 0.03}, "auc": 0.8}
    quality |= {"reliability": {"before": bins, "after": bins}, "thresholds": thresholds}
    points = [
        {"sweep": sweep, "value": value, "tau": 1.5 + value / 10, "speedup": speedup, "round_ms": 20.0}
        | {"speedup_ci95": speedup and [speedup - 0.1, speedup + 0.1]}
        for sweep in ("block_length", "depth", "nodes")
        for value in (1, 2, 4)
    ]
    batches = [
        {"temperature": 0.0, "batch": batch, "name": way, "tokens_per_second": 40.0 * batch**0.8, "tau": 1.6}
        | {
            "speedup": {"value": 1.1, "low": 1.0, "high": 1.2},
            "best_fixed": "fixed 2",
            "against_best_fixed": None,
        }
        | {"verified_per_request": None if way == "plain" else 2.0 / batch}
        for batch in (1, 4, 16)
        for way in ("plain", "fixed 2", "scheduler")
    ]
    promise = {"promised": 0.61, "measured": 0.6, "agreement": [0.99, 0.98], "blocks": 96}
    return {
        "eval_version": EVAL_VERSION,
        "drafter": name,
        "draft_digest": "d0",
        "target": "embedded:x",
        "target_digest": "abc",
        "device": "a machine",
        "dtype": "bfloat16",
        "seed": 0,
        "processes": 1,
        "max_new_tokens": 96,
        "tasks": {
            f"{task}@T={t}": entry(float(t), speedup, ties=int(task == "sums"))
            for task in TASKS
            for t in (0, 1)
        },
        "summary": {
            "temperature": 0.0,
            **mean,
            "speedup_vs_hf": speedup and 3.0,
            "lossless": speedup is not None,
            "by_temperature": by_temperature,
        },
        "blocks": blocks if trained else None,
        "confidence": {"greedy": quality, "sampled": quality} if trained else None,
        "sweeps": {"temperature": 0.0, "prompts": 2, "points": points} if trained else None,
        "throughput": batches if trained else None,
        "promise": {"greedy": promise | {"below": False, "unlike": False}} if trained else None,
        "warnings": [] if speedup else [{"name": "not_lossless", "message": "the output changed on sums"}],
        "decode": {
            "lookup": None,
            "tree": {"type": "chain"},
            "verify": None,
            "controller": {"type": "cost"},
        },
        "round_costs": None,
        "contexts": {
            f"{task}@T={t}": [
                {"start": 0, "end": 128, "rounds": 30, "tau": 2.6},
                {"start": 128, "end": 256, "rounds": 10, "tau": 1.8},
            ]
            for task in TASKS
            for t in (0, 1)
        },
        "provenance": {
            "git_commit": "c0ffee",
            "git_dirty": False,
            "command": f"deepspec evaluate --drafter {name}",
            "packages": {"python": "3.11", "torch": "2.13"},
            "cpu": "x86_64",
            "data_digest": None,
            "trained_at_commit": None,
        },
        **changes,
    }


def prompt_lines(
    gain: float = 2.0, accepted: int = 2, machine: float = 1.0, prompts: int = PROMPTS, label: str = "output"
) -> Iterator[dict]:
    """Measurements of a draft that is `gain` times as fast as plain decoding, on a machine `machine` times as slow;
    what it wrote begins with `label`."""
    rng = random.Random(0)
    for task in TASKS:
        for temperature in (0.0, 1.0):
            for index in range(prompts):
                seconds = machine * rng.uniform(1, 4)  # long and short answers
                plain = {"seconds": seconds, "tokens": 30, "accepted": [[0] * 30], "drafted": [[0] * 30]}
                rounds = 30 // (accepted + 1)
                draft = {"seconds": seconds / gain, "tokens": 30, "output": f"{label} {index}"}
                draft |= {"accepted": [[accepted] * rounds], "drafted": [[4] * rounds]}
                runs = {"plain": plain, "draft": draft}
                yield {"task": task, "temperature": temperature, "index": index, "runs": runs}


def output_hashes(lines: Iterable[dict]) -> dict[str, list[str]]:
    """Entry of a record → the outputs of its prompts."""
    found: dict[str, list[str]] = {}
    for line in lines:
        key = task_key(line["task"], line["temperature"])
        found.setdefault(key, []).append(line["runs"]["draft"]["output"])
    return found


def traces(name: str) -> list[dict]:
    """Two generations, in which the model and the prompt try to break out of the page."""
    tokens = [
        {"text": "Hello", "origin": "draft", "round": 0, "confidence": 0.8, "proposed": "Hello"},
        {"text": " world", "origin": "lookup", "round": 0, "confidence": 0.4, "proposed": " world"},
        {"text": HOSTILE, "origin": "target", "round": 0, "confidence": None, "proposed": None},
        {"text": "\n", "origin": "target", "round": 1, "confidence": 0.1, "proposed": "!"},
    ]
    alternatives = [[["Hello", 0.7], ["Hi", 0.2]], [], [[HOSTILE, 0.5]], [["!", 0.4]]]
    rows = [token | {"alternatives": of} for token, of in zip(tokens, alternatives, strict=True)]
    return [
        {"task": task, "temperature": 0.0, "prompt": f"{name} {HOSTILE}", "tau": 2.0, "tokens": rows}
        for task in TASKS
    ]


def write(root: Path, records: dict[str, dict]) -> Inputs:
    """Lay out what the stages would have left behind, and read it."""
    for folder in ("reports/eval", "reports/train", "data/distill"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, own in records.items():
        (root / f"reports/eval/{name}.json").write_text(json.dumps(own))
        if own["blocks"]:
            lines = [
                {"step": s, "loss": 3 - s / 100, "lr": 0.1, "heldout_tau": 1 + s / 100} for s in (20, 40, 60)
            ]
            (root / f"reports/eval/{name}.traces.json").write_text(json.dumps(traces(name)))
        else:
            lines = [{"step": 0}]
        (root / f"reports/train/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check = {
        "name": "rows",
        "meaning": "enough rows",
        "bound": "at least 1",
        "observed": "123",
        "passed": True,
    }
    validation = {"passed": True, "rows": 123, "checks": [check | {"examples": []}]}
    (root / "reports/validation.json").write_text(json.dumps(validation))
    (root / "data/distill/manifest.json").write_text('{"rows": 123}')
    return load_inputs(list(records), root)
