"""What the tests of training share: a target, sequences and their features."""

from __future__ import annotations

import pytest
import torch

from deepspec.features.local import CachedFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from tests.tiny import cached_target


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target("llama"))


@pytest.fixture(scope="module")
def sequences():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 40, (20,), generator=rng).tolist()
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in lengths]
    return [Sequence(row, [0] * 5 + [1] * (len(row) - 5), [1] * len(row)) for row in rows]


@pytest.fixture
def store(target, sequences, tmp_path):
    store = CachedFeatures(tmp_path / "features", target, sequences, (0, 1), "data")
    store.build()
    return store
