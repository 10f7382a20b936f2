"""Batches made ahead of time are those of their steps, and the thread that makes them ends with the run."""

from __future__ import annotations

import logging
import threading
from dataclasses import fields

import pytest
import torch

from deepspec.errors import DeepSpecError
from deepspec.features.local import OnlineFeatures
from deepspec.training.batches import Batches
from deepspec.training.prefetch import DEPTH, Prefetcher
from tests.trainers import make_trainer, weights_of

STEPS = 7
CPU = torch.device("cpu")


class Watched(Batches):
    """Remembers which step was made on which thread."""

    def __init__(self, *args):
        super().__init__(*args)
        self.made: list[tuple[int, str]] = []

    def make(self, step, *share):
        self.made.append((step, threading.current_thread().name))
        return super().make(step, *share)


@pytest.fixture
def batches(store) -> Watched:
    return Watched(store, list(range(2, 20)), 4, 6, 3, 0)


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, field.name), getattr(b, field.name))
        for a, b in zip(ours, theirs, strict=True)
        for field in fields(a)
    )


def worker_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_every_step_gets_the_batch_that_it_would_have_made_itself(batches, store):
    expected = Batches(store, list(range(2, 20)), 4, 6, 3, 0)
    with Prefetcher(batches, CPU, STEPS, 1, 2, 2) as prefetcher:
        for step in range(STEPS):
            assert same(prefetcher.take(step), expected.make(step, 1, 2, 2)), step
    assert [step for step, _ in batches.made] == list(range(STEPS))
    assert all(thread != threading.main_thread().name for _, thread in batches.made)


def test_several_workers_make_the_batches_of_their_steps(store):
    several = Watched(store, list(range(2, 20)), 4, 6, 3, 0)
    expected = Batches(store, list(range(2, 20)), 4, 6, 3, 0)
    steps = 3 * several.steps_per_epoch  # workers are in different epochs at times
    with Prefetcher(several, CPU, steps, workers=3) as prefetcher:
        for step in range(steps):
            assert same(prefetcher.take(step), expected.make(step)), step
            assert len(several.made) <= step + 1 + prefetcher.depth
    assert sorted(step for step, _ in several.made) == list(range(steps))
    assert len({thread for _, thread in several.made}) > 1


def test_no_more_than_the_next_batches_are_made(batches):
    with Prefetcher(batches, CPU, 1000) as prefetcher:
        prefetcher.take(3)
    assert max(step for step, _ in batches.made) <= 3 + DEPTH


def test_batches_ahead_are_dropped_when_other_anchors_are_replayed(batches, store):
    anchors = {i: [batches.starts(i)[-1]] for i in batches.members}
    expected = Batches(store, list(range(2, 20)), 4, 6, 3, 0)
    with Prefetcher(batches, CPU, STEPS) as prefetcher:
        prefetcher.take(0)
        batches.replayed = expected.replayed = anchors
        for step in range(1, STEPS):
            assert same(prefetcher.take(step), expected.make(step)), step


def test_online_features_are_never_read_on_another_thread(store):
    online = Watched(OnlineFeatures(store.target, store.sequences, store.layers), [2, 3, 4, 5], 2, 4, 3, 0)
    with Prefetcher(online, CPU, STEPS) as prefetcher:
        prefetcher.take(0)
        assert not worker_threads()
    assert online.made == [(0, threading.main_thread().name)]


def test_what_fails_on_the_worker_is_raised_in_the_trainer(store, tmp_path):
    trainer = make_trainer(store, tmp_path)
    original = trainer.batches.make

    def make(step, *share):
        if step == 4:
            raise DeepSpecError("shard 3: damaged")
        return original(step, *share)

    trainer.batches.make = make
    with pytest.raises(DeepSpecError, match=r"^shard 3: damaged$"):
        trainer.run()
    assert trainer.step == 4 and not worker_threads()


def test_the_thread_ends_when_a_run_is_interrupted(store, tmp_path):
    trainer = make_trainer(store, tmp_path)
    original = trainer.train_step

    def step():
        if trainer.step == 2:
            assert worker_threads()
            raise KeyboardInterrupt
        return original()

    trainer.train_step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not worker_threads()


def test_a_run_has_the_weights_of_steps_that_make_their_own_batches(store, tmp_path):
    ahead, alone = make_trainer(store, tmp_path / "ahead"), make_trainer(store, tmp_path / "alone")
    ahead.run()
    while alone.step < ahead.step:
        alone.train_step()
        alone.step += 1
    for name, weight in weights_of(ahead).items():
        assert torch.equal(weight, weights_of(alone)[name]), name


def test_the_share_of_waiting_is_kept_and_told_at_the_end(store, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "deepspec"):
        trainer = make_trainer(store, tmp_path)
        trainer.run()
    assert all(0 <= line["waiting_share"] <= 1 for line in trainer.history)
    assert [record.message for record in caplog.records if "waited for data" in record.message] == [
        f"steps waited for data {100 * trainer.waited / trainer.seconds:.1f} % of their time"
    ]
