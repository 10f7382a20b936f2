"""Error replay: rounds start where decoding would have begun them."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from deepspec.training.replay import rejected_starts, walk
from tests.trainers import make_trainer, weights_of


def test_rounds_follow_each_other_as_in_decoding():
    # Anchors 1..9, blocks of 3: accepted where the chance is 1, rejected where it is 0.
    chances = torch.ones(9, 3)
    chances[0] = torch.tensor([1.0, 0.0, 1.0])  # from 1: accepts one, rejected at 3 → next round at 3
    chances[2] = torch.tensor([1.0, 1.0, 1.0])  # from 3: all three → next at 7, not after a rejection
    chances[6] = torch.tensor([0.0, 1.0, 1.0])  # from 7: rejected at once → 8
    chances[7] = torch.tensor([1.0, -1.0, -1.0])  # from 8: the answer ends → 10, no anchor
    assert walk(chances, torch.full((9, 3), 0.5), list(range(1, 10))) == [3, 8]


def test_a_perfect_draft_is_never_rejected():
    assert walk(torch.ones(20, 4), torch.rand(20, 4), list(range(1, 21))) == []


def test_the_second_stage_trains_on_rejected_positions_and_resumes(store, tmp_path):
    unbroken = make_trainer(store, tmp_path / "unbroken", replay=0.5)
    unbroken.run()
    assert unbroken.replay_from == 5 and unbroken.batches.replayed
    for i, starts in unbroken.batches.replayed.items():
        assert set(starts) <= set(unbroken.batches.starts(i))
    killed = make_trainer(store, tmp_path / "killed", replay=0.5)
    original = killed.train_step

    def step():
        if killed.step == 7:
            raise KeyboardInterrupt
        return original()

    killed.train_step = step
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer(store, tmp_path / "killed", replay=0.5)
    resumed.run()
    assert resumed.batches.replayed == unbroken.batches.replayed
    for name, weight in weights_of(unbroken).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_starts_depend_on_the_seed_alone(store, tmp_path):
    trainer = make_trainer(store, tmp_path / "work")
    accelerator = Accelerator(cpu=True)
    first, again, other = (rejected_starts(trainer.raw, trainer.batches, accelerator, s) for s in (0, 0, 1))
    assert first == again != other
