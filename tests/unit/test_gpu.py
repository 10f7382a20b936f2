"""The same tokens on a GPU as on the CPU, and a training step there. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from deepspec.decoding.cost import load_or_measure
from deepspec.decoding.engine import generate
from deepspec.decoding.shapes import BestFirst, Sampled
from deepspec.decoding.tree import Chain
from deepspec.drafters.algorithms.dspark import DSparkDrafter
from deepspec.features.local import CachedFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer
from tests.tiny import make_draft, make_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [[5, 9, 14, 3, 77, 20], [100, 101, 102], [7] * 70]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


TREES = {"plain": None, "chain": Chain(), "tree": BestFirst(width=3, depth=3, nodes=8)}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("graphs", [False, True])
def test_greedy_tokens_are_those_of_the_cpu(directory, name, graphs):
    tokens = {}
    for device in ("cpu", "cuda"):
        target = load_target(directory, dtype="float32", device=device, graphs=graphs and device == "cuda")
        drafter = DSparkDrafter(make_draft(target), target) if name != "plain" else None
        tokens[device] = [run.tokens for run in generate(target, drafter, PROMPTS, 24, tree=TREES[name])]
    assert tokens["cpu"] == tokens["cuda"]


@pytest.mark.parametrize("tree", [Chain(), Sampled((2, 2))])
def test_sampling_with_a_draft_runs_and_reproduces(directory, tree):
    target = load_target(directory, dtype="bfloat16", device="cuda")
    drafter = DSparkDrafter(make_draft(target), target)
    options = {"temperature": 1.0, "seed": 3, "tree": tree}
    runs = [generate(target, drafter, PROMPTS[0], 24, **options)[0].tokens for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_cost_curve_is_measured_there(directory, tmp_path):
    target = load_target(directory, dtype="bfloat16", device="cuda")
    drafter = DSparkDrafter(make_draft(target), target)
    curve = load_or_measure(target, drafter, tmp_path, batches=(1, 4))
    assert 0 < curve.verify(4, 16) < 1 and 0 < curve.draft(1) < 1


def test_graphs_are_replayed_and_go_on_after_the_cache_has_grown(directory):
    plain, replaying = (load_target(directory, dtype="float32", graphs=graphs) for graphs in (False, True))
    for prompt in (PROMPTS[0], [7] * 240):
        tokens = [generate(target, None, prompt, 40)[0].tokens for target in (plain, replaying)]
        assert tokens[0] == tokens[1]
    assert len(replaying._graphs._graphs) >= 2


def test_training_runs(directory, tmp_path):
    target = load_target(directory, device="cuda")
    rows = [[(7 * i + j) % 500 for j in range(30)] for i in range(12)]
    sequences = [Sequence(row, [1] * 30, [1] * 30) for row in rows]
    store = CachedFeatures(tmp_path / "features", target, sequences, (0, 1), "data")
    store.build()
    params = TrainParams(steps=4, lr=1e-3, batch_size=4, anchors=4, eval_every=2, save_every=2)
    batches = Batches(store, list(range(2, 12)), 4, 4, 3, seed=0)
    accelerator = Accelerator(mixed_precision="bf16")
    objective = BlockObjective(make_draft(target), params.loss).to(accelerator.device)
    trainer = Trainer(objective, batches, [0, 1], params, accelerator, tmp_path / "work")
    trainer.run()
    assert trainer.step == 4 and trainer.best_tau >= 1
