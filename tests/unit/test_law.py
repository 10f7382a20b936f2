"""The law of what the engine writes at temperature > 0, by chi-square on a tiny target.

`test_verify.py` proves the rules on tables; here they run in the engine, behind its sampler, masks and caches.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepspec.decoding import verify
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import BestFirst, Chain, Sampled
from deepspec.decoding.verify import standard
from deepspec.target.model import load_target
from tests.laws import Case, MarkovDrafter, exact_law, p_value, taught
from tests.tiny import cached_target

CASE = Case(prompt=(77,), length=3, sampling=Sampling(temperature=1.0, top_k=3), draws=4_000)
CERTAIN = 1e-30  # the faults below come out under 1e-100; one of a quarter of their size is still caught


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target(vocab=300, layers=2, hidden=32))


@pytest.fixture(scope="module")
def expected(target) -> dict[tuple[int, ...], float]:
    law = exact_law(target, CASE)
    assert len(law) == 3**CASE.length
    return law


@pytest.fixture(scope="module")
def drafter(target):
    return MarkovDrafter(target, CASE)


CASES = {
    "standard": (Chain(), "standard"),
    "block": (Chain(), "block"),
    "recursive": (Sampled((2, 1)), "recursive"),
    "traversal": (Sampled((2, 1)), "traversal"),
    "walk": (BestFirst(2, None, 4), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_engine_writes_the_targets_law(target, drafter, expected, name):
    assert p_value(target, drafter, expected, CASE, *CASES[name]) > 0.01


DRAFTERS = ("dflash2", "dspark-causal", "eagle3-3.1", "peagle", "mtp")
LONGER = replace(CASE, length=4, draws=1_500)  # so that two tokens are drafted after the first


@pytest.fixture(scope="module")
def deeper():
    """A target with layers enough to read from."""
    return load_target(cached_target(vocab=300, layers=3, hidden=32))


@pytest.fixture(scope="module")
def taught_drafter(request, deeper, tmp_path_factory):
    return taught(request.param, deeper, LONGER, tmp_path_factory.mktemp("draft") / "draft")


@pytest.mark.parametrize("name", ["block", "traversal", "walk"])
@pytest.mark.parametrize("taught_drafter", DRAFTERS, indirect=True)
def test_the_law_is_the_targets_with_every_drafter(deeper, taught_drafter, name):
    assert p_value(deeper, taught_drafter, exact_law(deeper, LONGER), LONGER, *CASES[name]) > 0.01


def resampling_from_p(proposal, law, uniform, pick):
    """`standard`, but for where the next token comes from after a rejection."""
    accepted, _ = standard(proposal, law, uniform, lambda weights: -1)
    return accepted, pick(law(len(accepted) - 1))


def test_the_same_test_catches_a_broken_chain_rule(target, drafter, expected):
    assert p_value(target, drafter, expected, CASE, Chain(), resampling_from_p) < CERTAIN


def test_the_same_test_catches_the_tree_rule_of_public_code(target, drafter, expected, monkeypatch):
    """Traversal with r(u) ← S."""
    lose = verify._Stop.lose

    def broken(self, token):
        mass = float((self.r * self.p - self.q).clamp(min=0).sum())
        lose(self, token)
        self.r = mass

    monkeypatch.setattr(verify._Stop, "lose", broken)
    assert p_value(target, drafter, expected, CASE, Sampled((2, 1)), "traversal") < CERTAIN
