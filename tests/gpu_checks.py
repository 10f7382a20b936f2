"""What has to hold on a GPU: the CPU's tokens, sampling that reproduces, a cost curve, graphs, a training step.

Plain functions, which `tests/unit/test_gpu.py` runs under pytest and `benchmarks/gpu` without it. Each takes the
directory of a target of `tests.tiny`, an empty folder and a device; `GRAPHS` need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from deepspec.decoding.engine import generate
from deepspec.decoding.profiles import load_or_measure
from deepspec.decoding.shapes import BestFirst, Chain, Sampled
from deepspec.drafters.algorithms.dspark import DSparkDrafter
from deepspec.features.local import CachedFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer
from tests.tiny import make_draft

Check = Callable[[Path, Path, str], None]
PROMPTS = [[5, 9, 14, 3, 77, 20], [100, 101, 102], [7] * 70]
TREES = {"plain": None, "chain": Chain(), "tree": BestFirst(width=3, depth=3, nodes=8)}


def greedy_tokens_are_those_of_the_cpu(
    directory: Path, folder: Path, device: str, tree: str, graphs: bool
) -> None:
    tokens = []
    for where, replayed in (("cpu", False), (device, graphs)):
        target = load_target(directory, dtype="float32", device=where, graphs=replayed)
        drafter = DSparkDrafter(make_draft(target), target) if tree != "plain" else None
        tokens.append([run.tokens for run in generate(target, drafter, PROMPTS, 24, tree=TREES[tree])])
    assert tokens[0] == tokens[1]


def sampling_with_a_draft_reproduces(
    directory: Path, folder: Path, device: str, tree: Chain | Sampled
) -> None:
    target = load_target(directory, dtype="bfloat16", device=device)
    drafter = DSparkDrafter(make_draft(target), target)
    options = {"temperature": 1.0, "seed": 3, "tree": tree}
    runs = [generate(target, drafter, PROMPTS[0], 24, **options)[0].tokens for _ in range(2)]
    assert runs[0] == runs[1]


def a_cost_curve_is_measured(directory: Path, folder: Path, device: str) -> None:
    target = load_target(directory, dtype="bfloat16", device=device)
    drafter = DSparkDrafter(make_draft(target), target)
    curve = load_or_measure(target, drafter, folder, batches=(1, 4))
    assert 0 < curve.verify(4, 16) < 1 and 0 < curve.draft(1) < 1


def graphs_go_on_after_the_cache_has_grown(directory: Path, folder: Path, device: str) -> None:
    plain, replaying = (
        load_target(directory, dtype="float32", device=device, graphs=graphs) for graphs in (False, True)
    )
    for prompt in (PROMPTS[0], [7] * 240):
        tokens = [generate(target, None, prompt, 40)[0].tokens for target in (plain, replaying)]
        assert tokens[0] == tokens[1]
    assert len(replaying._graphs._graphs) >= 2


def training_runs(directory: Path, folder: Path, device: str) -> None:
    target = load_target(directory, device=device)
    rows = [[(7 * i + j) % 500 for j in range(30)] for i in range(12)]
    sequences = [Sequence(row, [1] * 30, [1] * 30) for row in rows]
    store = CachedFeatures(folder / "features", target, sequences, (0, 1), "data")
    store.build()
    params = TrainParams(steps=4, lr=1e-3, batch_size=4, anchors=4, eval_every=2, save_every=2)
    batches = Batches(store, list(range(2, 12)), 4, 4, 3, seed=0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    objective = BlockObjective(make_draft(target), params.loss).to(accelerator.device)
    trainer = Trainer(objective, batches, [0, 1], params, accelerator, folder / "work")
    trainer.run()
    assert trainer.step == 4 and trainer.best_tau >= 1


def _greedy(graphs: bool) -> dict[str, Check]:
    how = "with graphs" if graphs else "eager"
    return {
        f"greedy tokens, {tree}, {how}": partial(greedy_tokens_are_those_of_the_cpu, tree=tree, graphs=graphs)
        for tree in TREES
    }


CHECKS: dict[str, Check] = {
    **_greedy(graphs=False),
    "sampling, chain": partial(sampling_with_a_draft_reproduces, tree=Chain()),
    "sampling, tree": partial(sampling_with_a_draft_reproduces, tree=Sampled((2, 2))),
    "a cost curve": a_cost_curve_is_measured,
    "a training run": training_runs,
}
GRAPHS: dict[str, Check] = {
    **_greedy(graphs=True),
    "graphs, the cache grown": graphs_go_on_after_the_cache_has_grown,
}
