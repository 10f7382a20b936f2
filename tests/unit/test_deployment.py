"""How a draft is used is put together in one place, from `evaluate.decode` alone."""

from __future__ import annotations

import pytest

from deepspec.decoding import profiles
from deepspec.decoding.cost import CostCurve
from deepspec.decoding.scheduler import CostStop, Fixed
from deepspec.decoding.shapes import CHAIN, BestFirst
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.algorithms.suffix import SuffixDrafter
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.deployment import Deployment
from deepspec.drafters.load import load_drafter
from deepspec.drafters.params import DecodeParams
from deepspec.errors import DeepSpecError
from deepspec.target.model import load_target
from tests.tiny import make_network

FIXED = {"type": "fixed", "length": 2}


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(tiny_target)


@pytest.fixture(scope="module")
def draft(target, tmp_path_factory):
    network = make_network(target, "dspark", layers=1, block_size=3, markov_rank=4, target_layer_ids=[0, 1])
    directory = tmp_path_factory.mktemp("drafts") / "dspark"
    write_drafter(directory, network.description(), stored_weights(network), target, {})
    return directory


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch):
    """Batches of which a curve was measured; nothing is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batches = []

    def measure(target, wanted, **options):
        batches.append(tuple(wanted))
        return {batch: [(1.0, 1.0), (8.0, 1.5)] for batch in wanted}

    monkeypatch.setattr(profiles, "measure_passes", measure)
    return batches


def test_everything_that_decode_says_is_used(target, draft):
    decode = DecodeParams.model_validate(
        {
            "lookup": {"type": "lookup", "block_size": 5, "min_match": 4},
            "tree": {"type": "best_first", "width": 2, "nodes": 6},
            "controller": FIXED,
        }
    )
    used = Deployment.of(target, draft, decode)
    assert (used.drafter.lookup.block_size, used.drafter.lookup.min_match) == (5, 4)
    assert used.tree == BestFirst(2, None, 6)
    assert type(used.controller) is Fixed and used.controller.length == 2


def test_a_lookup_in_front_stands_for_the_trained_draft(target, draft):
    drafter = Deployment.of(target, draft, DecodeParams(controller=FIXED)).drafter
    alone = load_drafter(draft, target)
    assert isinstance(drafter.lookup, SuffixDrafter)
    assert type(drafter.trained) is type(alone) and alone.trained is alone
    for name in ("layers", "vocab_size", "digest"):
        assert getattr(drafter, name) == getattr(alone, name) is not None


def test_a_draft_that_is_a_lookup_stays_alone(target, tmp_path):
    lookup = LookupDrafter(4, 1)
    write_drafter(tmp_path / "lookup", lookup.config, {}, target, {})
    used = Deployment.of(target, tmp_path / "lookup", DecodeParams(controller=FIXED))
    assert isinstance(used.drafter, LookupDrafter)


def test_costs_are_measured_only_for_a_controller_that_decides_by_them(target, draft, measured):
    Deployment.of(target, draft, DecodeParams(controller=FIXED))
    assert measured == []
    used = Deployment.of(target, draft)
    assert measured == [(1,)] and type(used.controller) is CostStop
    Deployment.of(target, draft)
    assert measured == [(1,)], "the curve was kept"
    curve = CostCurve({1: [(1, 2.0)]})
    assert Deployment.of(target, draft, curve=curve).controller.curve is curve


def test_without_a_draft_the_target_decodes_plainly(target):
    plain = Deployment(target)
    assert (plain.drafter, plain.tree, plain.controller) == (None, CHAIN, None)
    (out,) = plain.generate([5, 9, 14], max_new_tokens=4)
    assert not any(out.stats.drafted)


def test_a_tree_and_a_rule_that_do_not_fit_are_refused(target, draft):
    decode = DecodeParams.model_validate(
        {"tree": {"type": "best_first"}, "verify": "block", "controller": FIXED}
    )
    with pytest.raises(DeepSpecError, match="BestFirst trees are not drawn"):
        Deployment.of(target, draft, decode).engine()
