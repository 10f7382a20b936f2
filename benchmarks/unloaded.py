"""Peak memory of a trainer that never loads the target's layers, beside the target's size.

A random mixture of experts (with latent attention: `--family deepseek_v3`) answers, then a draft is trained three
times, each time in a process of its own: on vLLM's states online, on vLLM's states cached, and on states that are
computed here, for which the target is loaded. Most of the target are its experts; `--layers` makes it smaller or
larger. Pages of files that a process maps count apart: the proof of layers goes through the whole checkpoint, and the
system takes such pages back when it needs them. vLLM is found as docs/vllm.md says.

    python -m benchmarks.unloaded --family qwen3_moe
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import yaml

from benchmarks.common import REPORTS, command_line, write_report
from benchmarks.tiny_families import tiny_config
from benchmarks.training_steps import resident
from deepspec.errors import DeepSpecError
from deepspec.markdown import markdown_table
from deepspec.target.source import model_class
from deepspec.target.weights import stored
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parents[1]
WIDTH, EXPERTS, EXPERT_WIDTH, HEADS = 512, 64, 1024, 4
LATENT = {  # the one size for which vLLM's kernel for CPUs is built
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "head_dim": 64,
    "q_lora_rank": 128,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 64, "num_key_value_heads": 2, "num_local_experts": EXPERTS},
    "deepseek_v3": LATENT,
}
WAYS = {  # → target.engine, train.features.mode
    "vLLM's, online": ("vllm", "online"),
    "vLLM's, cached": ("vllm", "cached"),
    "computed here, cached": ("local", "cached"),
}


def make_target(directory: Path, family: str, layers: int) -> None:
    """Write a random target in bfloat16, in shards of a layer's size."""
    own = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    own |= {
        "moe_intermediate_size": EXPERT_WIDTH,
        "intermediate_size": EXPERT_WIDTH,
        "num_experts_per_tok": 4,
    }
    config = tiny_config(family, **own | FAMILIES[family])
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = model_class(config).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                scale = 0.25 if "down_proj" in name else 1.0  # so that a near tie of two experts moves little
                weight.normal_(0, 1.0 if "embed" in name else scale * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory, max_shard_size="250MB")
    tokenizer.save_pretrained(directory)


def settings(target: Path, engine: str, mode: str) -> dict[str, Any]:
    """The smoke run's parameters with this target, answers of vLLM, and one drafter."""
    raw = yaml.safe_load((ROOT / "params.smoke.yaml").read_text(encoding="utf-8"))
    raw["target"] = {"source": str(target), "dtype": "bfloat16", "engine": engine}
    raw["prompts"] |= {"count": 48, "mix": {"seed": 1.0}}
    raw["generate"] |= {"max_new_tokens": 48}
    raw["pipeline"] = ["eagle3"]
    raw["train"] |= {"steps": 20, "eval_every": 10, "save_every": 10, "real_decode": False}
    raw["train"]["features"] = {"mode": mode}
    return raw


def one(words: list[str]) -> None:
    """Run a stage in this process, and say what memory it took at most: its own, and with the files that it maps."""
    sys.argv, own, ended = words, [0], Event()

    def watch() -> None:
        while not ended.wait(0.02):
            own[0] = max(own[0], resident("RssAnon"))

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        if stopped.code:
            raise
    ended.set()
    watcher.join()
    print(json.dumps({"own_bytes": own[0], "mapped_bytes": resident("VmHWM")}))


def stage(folder: Path, name: str, *words: str) -> dict[str, float]:
    """`one` in a fresh process, in `folder`.

    Raises:
        DeepSpecError: it failed.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.unloaded", "--one", f"deepspec.stages.{name}", *words]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise DeepSpecError(f"{name}: {(ran.stderr.strip().splitlines()[-1:] or ['no message'])[0]}")
    return json.loads(ran.stdout.strip().splitlines()[-1]) | {"seconds": time.perf_counter() - began}


def measure(folder: Path, family: str, layers: int) -> dict[str, Any]:
    """Make the target, let vLLM answer, train each way."""
    made = folder / "made"
    make_target(made, family, layers)
    found: dict[str, Any] = {}
    for number, (way, (engine, mode)) in enumerate(WAYS.items()):
        name = f"way-{number}"
        params = folder / f"{name}.yaml"
        params.write_text(yaml.safe_dump(settings(made, engine, mode)))
        if not found:
            for first in ("target", "prompts", "generate"):
                stage(folder, first, "--params", str(params))
        flags = ("--drafter", "eagle3", "--as", name, "--params", str(params))
        history = folder / f"reports/train/{name}.jsonl"
        found[way] = stage(folder, "train", *flags)
        found[way]["heldout_tau"] = json.loads(history.read_text().splitlines()[-1])["heldout_tau"]
    sizes = {name: weight.size * torch.bfloat16.itemsize for name, weight in stored(made).items()}
    layered = sum(size for name, size in sizes.items() if ".layers." in name)
    return {"ways": found, "target_bytes": sum(sizes.values()), "layer_bytes": layered}


def table(ways: dict[str, dict[str, float]]) -> str:
    rows = [
        (
            way,
            f"{of['own_bytes'] / 1e6:.0f}",
            f"{of['mapped_bytes'] / 1e6:.0f}",
            f"{of['heldout_tau']:.3f}",
            f"{of['seconds']:.0f}",
        )
        for way, of in ways.items()
    ]
    heads = ("states", "the trainer's peak, MB", "with mapped files", "held-out τ", "s")
    return markdown_table(heads, rows, "tn")


def arguments() -> argparse.ArgumentParser:
    parser = command_line("unloaded", __doc__)
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="qwen3_moe", help="default: %(default)s")
    add("--layers", type=int, default=8, help="of 200 MB each (default: %(default)s)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    add("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    if flags.one:
        one(flags.one)
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), flags.family, flags.layers)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    whole, layers = found["target_bytes"] / 1e6, found["layer_bytes"] / 1e6
    said = (
        f"A {flags.family} of {flags.layers} layers, {whole:.0f} MB, of which its layers are {layers:.0f} MB."
    )
    body = f"{said}\n\n{table(found['ways'])}"
    write_report(
        flags.output, f"unloaded-{flags.family}", "A trainer without the target's layers", body, found
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
