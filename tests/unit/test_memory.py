"""Weights in large pages: the same numbers, side by side in memory that goes back to the system with them."""

from __future__ import annotations

import gc
import mmap
import pickle
from copy import deepcopy

import psutil
import pytest
import torch

from deepspec.target import memory
from deepspec.target.memory import in_large_pages

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_pages", memory._LargePages())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int16])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), (40, 16, 2)])
def test_copies_are_equal_contiguous_and_begin_a_cache_line(dtype: torch.dtype, shape: tuple[int, ...]):
    given = torch.randint(0, 100, shape).to(dtype).transpose(0, -1)
    copies = [in_large_pages(given) for _ in range(3)]
    for copy in (*copies, deepcopy(copies[0]), pickle.loads(pickle.dumps(copies[0]))):
        assert copy.dtype == dtype and copy.is_contiguous() and torch.equal(copy, given)
    for copy in copies:
        assert copy.data_ptr() % 64 == 0
        copy.zero_()  # its own memory
    assert not given.numel() or given.float().abs().sum() > 0


def test_what_is_larger_than_a_piece_has_one_of_its_own():
    small, large = in_large_pages(torch.ones(8)), in_large_pages(torch.ones(70 * MIB, dtype=torch.uint8))
    assert int(large.sum()) == 70 * MIB and float(small.sum()) == 8


def test_memory_goes_back_with_the_last_tensor_in_a_piece():
    process = psutil.Process()
    before = process.memory_info().rss
    held = [in_large_pages(torch.ones(60 * MIB, dtype=torch.uint8)) for _ in range(4)]
    grown = process.memory_info().rss - before
    held.clear()
    gc.collect()
    assert grown > 200 * MIB
    assert process.memory_info().rss - before < 130 * MIB  # the last piece is kept for what comes next
    large = in_large_pages(torch.ones(300 * MIB, dtype=torch.uint8))
    assert process.memory_info().rss - before > 300 * MIB
    del large
    gc.collect()
    assert process.memory_info().rss - before < 130 * MIB


def test_where_there_are_no_large_pages_a_copy_lies_where_torch_puts_it(monkeypatch: pytest.MonkeyPatch):
    given = torch.arange(6).view(2, 3).T
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(in_large_pages(given), given)

    def refused(*args, **flags):
        raise OSError

    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(mmap, "mmap", refused)
    copy = in_large_pages(given)
    assert torch.equal(copy, given) and copy.is_contiguous()
