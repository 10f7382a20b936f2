"""The same tokens on a GPU as on the CPU, and a training step there. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_checks import CHECKS, GRAPHS
from tests.tiny import make_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ALL = CHECKS | GRAPHS


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("name", ALL)
def test_it_holds_on_a_gpu(directory, tmp_path, name):
    ALL[name](directory, tmp_path, "cuda")
