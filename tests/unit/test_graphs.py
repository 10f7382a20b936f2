"""Passes in buckets with everything in tensors: what a CUDA graph replays, here replayed by running it again."""

from __future__ import annotations

import pytest

from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.shapes import BestFirst, Chain
from deepspec.drafters.algorithms.dspark import DSparkDrafter
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.errors import DeepSpecError
from deepspec.target.graphs import MOST_TOKENS, GraphedPasses
from deepspec.target.model import Target, load_target
from tests.tiny import FAMILIES, cached_target, make_draft

PROMPTS = [[5, 9, 14, 3, 77, 20], [100, 101, 102], [7] * 70, [11, 12] * 9]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request):
    return cached_target(request.param)


def with_graphs(directory) -> tuple[Target, list[int]]:
    """A target that replays, and a list that grows by one with each replay."""
    target = load_target(directory, dtype="float32")
    replays: list[int] = []

    def capture(run):
        def replay():
            replays.append(1)
            run()

        run()
        return replay

    target._graphs = GraphedPasses(target._run, capture)
    return target, replays


def trained(target: Target) -> DSparkDrafter:
    return DSparkDrafter(make_draft(target, target_layer_ids=[-1, 0]), target)


DRAFTERS = {
    "plain": (lambda target: None, Chain()),
    "lookup": (lambda target: LookupDrafter(4, 1), Chain()),
    "chain": (trained, Chain()),
    "tree": (trained, BestFirst(width=3, depth=3, nodes=8)),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_the_same(directory, name, batch):
    make, tree = DRAFTERS[name]
    tokens = []
    replaying, replays = with_graphs(directory)
    for target in (load_target(directory, dtype="float32"), replaying):
        runs = generate(target, make(target), PROMPTS, 24, tree=tree, batch_size=batch)
        tokens.append([run.tokens for run in runs])
    assert tokens[0] == tokens[1]
    assert len(replays) > 10


def test_the_next_engine_takes_over_the_cache_and_the_graphs(directory):
    target, replays = with_graphs(directory)
    prompt = [5]  # nothing to prefill
    plain = generate(load_target(directory, dtype="float32"), None, prompt, 12)[0].tokens
    for _ in range(2):
        before = len(replays)
        assert generate(target, None, prompt, 12)[0].tokens == plain
    assert len(replays) - before == 12  # from the first round on
    assert len(target._graphs._graphs) == 1


def test_engines_at_work_together_do_not_share_a_cache(directory):
    target, _ = with_graphs(directory)
    first, second = Engine(target), Engine(target)
    assert first.cache is not second.cache


def test_a_long_pass_is_no_graph(directory):
    target, replays = with_graphs(directory)
    generate(target, None, [[3] * (MOST_TOKENS + 2)] * 3, 1, batch_size=1)
    assert len(target._graphs._graphs) == 1 and len(replays) == 2  # the one-token rounds


def test_graphs_without_a_gpu_are_an_error(directory):
    with pytest.raises(DeepSpecError, match="CUDA graphs need a GPU"):
        load_target(directory, device="cpu", graphs=True)
