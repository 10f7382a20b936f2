"""Beyond what it has learnt from, a draft sees the end of a context; up to there nothing changes."""

from __future__ import annotations

import json

import pytest
import torch

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Chain
from deepspec.drafters import window
from deepspec.drafters.checkpoint import RECORD
from deepspec.drafters.load import load_drafter
from deepspec.target.model import load_target
from tests.drafting import make, write
from tests.tiny import cached_target

KINDS = ("eagle3", "peagle-1", "dspark", "dflash", "dflash2")


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target("llama"))


def draft(name: str, target, path, longest: int | None):
    model = make(name, target)
    if hasattr(model.config, "sliding_window"):
        object.__setattr__(model.config, "sliding_window", None)
    written = write(model, target, path)
    made = json.loads((written / RECORD).read_text())
    (written / RECORD).write_text(
        json.dumps(made | ({"row_tokens": {"longest": longest}} if longest else {}))
    )
    return written


def law(drafter, length: int) -> torch.Tensor:
    """The first law behind a text of so many tokens."""
    rng = torch.Generator().manual_seed(0)
    width = len(drafter.layers) * 64
    tokens = torch.randint(2, 500, (length + 1,), generator=rng).tolist()
    session = drafter.session(1)
    session.begin(0)
    session.extend(0, tokens[:-1], torch.randn(length, width, generator=rng))
    (proposal,) = session.propose([DraftRequest(0, tokens[-1], Sampling(1.0), rng, 9, Chain())])
    return proposal.law(0)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_draft_of_short_rows_sees_the_end_of_a_long_context(name, target, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "SEEN", 24)
    whole = load_drafter(draft(name, target, tmp_path / "whole", None), target)
    short = load_drafter(draft(name, target, tmp_path / "short", 20), target)
    long = load_drafter(draft(name, target, tmp_path / "long", 400), target)
    assert torch.equal(law(short, 16), law(whole, 16))
    assert torch.equal(law(long, 60), law(whole, 60)) and not torch.allclose(law(short, 60), law(whole, 60))


@pytest.mark.parametrize("name", KINDS)
def test_a_window_changes_no_token(name, target, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "SEEN", 12)
    drafter = load_drafter(draft(name, target, tmp_path / "draft", 10), target)
    plain, drafted = (generate(target, d, [5, 9, 17], max_new_tokens=40) for d in (None, drafter))
    assert plain[0].tokens == drafted[0].tokens


def test_a_window_of_its_own_stays(target, tmp_path):
    path = write(make("dspark-causal", target), target, tmp_path / "draft")
    made = json.loads((path / RECORD).read_text())
    (path / RECORD).write_text(json.dumps(made | {"row_tokens": {"longest": 10}}))
    assert load_drafter(path, target).config.windows == (6, 6)
