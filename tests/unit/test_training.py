"""The training loop: resumed runs equal unbroken ones, and bad data stops with one line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from deepspec.config import load_params
from deepspec.drafters.algorithms.dspark import DSparkModel
from deepspec.drafters.network import Outputs
from deepspec.drafters.start import channel_std, draft_vocabulary
from deepspec.errors import DeepSpecError
from deepspec.features.read import read_sequences
from deepspec.features.sequences import Sequence, Sequences
from deepspec.target.ends import H_LAST
from deepspec.training.batches import Batches, passes
from deepspec.training.distribute import CHECKPOINT
from deepspec.training.prepare import split
from deepspec.training.run import make_accelerator, own_loss, tracked_to_its_end
from deepspec.training.trainer import Trainer, schedule
from tests.trainers import STEPS, make_trainer, weights_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("start", ["random", "target"])
def test_a_killed_and_resumed_run_equals_an_unbroken_one_bit_for_bit(store, tmp_path, start):
    unbroken = make_trainer(store, tmp_path / "unbroken", start=start)
    unbroken.run()
    killed = make_trainer(store, tmp_path / "killed", start=start)
    killed.train_step, steps = dying_after(5, killed), STEPS
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer(store, tmp_path / "killed", start=start)
    resumed.run()
    assert resumed.step == steps
    for name, weight in weights_of(unbroken).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    assert [line["heldout_tau"] for line in resumed.history] == [
        line["heldout_tau"] for line in unbroken.history
    ]
    hours = [line["hours"] for line in resumed.history]
    assert hours == sorted(hours) and hours[-1] > 0
    assert resumed.before > 0, "the first sitting's steps count"


def dying_after(count: int, trainer: Trainer):
    original, done = trainer.train_step, []

    def step():
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(1)
        return original()

    return step


def test_a_batch_in_parts_trains_as_a_whole_one(store, tmp_path):
    whole, parts = (
        make_trainer(store, tmp_path / "whole"),
        make_trainer(store, tmp_path / "parts", accumulate=3),
    )
    whole.run()
    parts.run()
    for ours, theirs in zip(whole.history, parts.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["heldout_tau"] == pytest.approx(theirs["heldout_tau"], abs=1e-3)


def test_gradient_checkpointing_changes_no_gradient(store, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(store, tmp_path / "work")
        trainer.raw.model.checkpointing = checkpointing
        trainer.raw.train()
        loss, _ = trainer.raw(trainer.batches.make(0)[0])
        loss.backward()
        gradients.append(trainer.raw.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


def test_sigterm_writes_a_checkpoint_and_exits(store, tmp_path):
    trainer = make_trainer(store, tmp_path / "work", save_every=1000)
    original = trainer.train_step

    def step():
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original()

    trainer.train_step = step
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert stopped.value.code == 143
    assert torch.load(tmp_path / "work" / CHECKPOINT)["progress"]["step"] == 4


def test_training_learns(store, tmp_path):
    trainer = make_trainer(store, tmp_path / "work", steps=40, eval_every=10)
    trainer.run()
    losses = [line["loss"] for line in trainer.history]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_stops_with_one_line(store, tmp_path):
    trainer = make_trainer(store, tmp_path / "work")
    with torch.no_grad():
        trainer.raw.model.fc.weight[0, 0] = float("nan")
    with pytest.raises(DeepSpecError, match="step 0: the loss is not finite"):
        trainer.run()
    assert not (tmp_path / "work" / CHECKPOINT).exists()


def test_a_corrupt_checkpoint_is_named(store, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(DeepSpecError, match="corrupt checkpoint"):
        make_trainer(store, tmp_path / "work").run()


def batches_of_lists(
    members: list[int], lengths: list[int], size: int, seed: int, epoch: int
) -> list[list[int]]:
    """An epoch's batches as they were made of Python's lists."""
    rng = torch.Generator().manual_seed(seed * 100003 + epoch)
    shuffled = [members[i] for i in torch.randperm(len(members), generator=rng).tolist()]
    batches = []
    for start in range(0, len(shuffled), size * 16):
        part = sorted(shuffled[start : start + size * 16], key=lambda i: lengths[i])
        batches += [part[j : j + size] for j in range(0, len(part), size)]
    whole = [batch for batch in batches if len(batch) == min(size, len(members))]
    return [whole[i] for i in torch.randperm(len(whole), generator=rng).tolist()]


@pytest.mark.parametrize(("rows", "size"), [(100, 3), (97, 4), (5, 8), (1, 1)])
def test_the_order_of_arrays_is_that_of_lists(rows, size):
    rng = torch.Generator().manual_seed(rows)
    lengths = torch.randint(4, 9, (rows + 3,), generator=rng).tolist()
    sequences = Sequences.of(Sequence([1] * n, [0] * n, [1] * n) for n in lengths)
    members = list(range(3, rows + 3))
    batches = Batches(SimpleNamespace(sequences=sequences), members, size, 4, 2, seed=5)
    for epoch in (0, 2):
        expected = batches_of_lists(members, lengths, size, 5, epoch)
        first = epoch * batches.steps_per_epoch
        assert [batches.indices(first + i) for i in range(batches.steps_per_epoch)] == expected


def test_two_processes_see_the_blocks_of_one(store):
    batches = Batches(store, list(range(20)), 4, 5, 3, seed=1)
    (whole,) = batches.make(2)
    halves = [batches.make(2, rank, 2)[0] for rank in range(2)]
    assert torch.equal(whole.anchors[0::2], halves[0].anchors)
    assert torch.equal(whole.anchors[1::2], halves[1].anchors)


def test_a_row_that_would_pad_its_batch_is_passed_on_its_own(store, sequences):
    whole = Batches(store, list(range(20)), 4, 5, 3, seed=1)
    longest = max(len(sequence.ids) for sequence in sequences)
    parted = Batches(store, list(range(20)), 4, 5, 3, seed=1, pass_tokens=longest)
    (batch,) = whole.make(2)
    parts = parted.make(2)
    assert len(parts) > 1 and all(part.tokens.numel() <= longest for part in parts)
    assert torch.equal(batch.anchors, torch.cat([part.anchors for part in parts]))


def padding_share(lengths: list[int], parts: Iterable[list[int]]) -> float:
    padded = sum(max(lengths[i] for i in part) * len(part) for part in parts)
    return 1 - sum(lengths) / padded


SKEWED = [
    [300] * 7 + [32_768],
    [300] * 7 + [8_192],
    [64] * 30 + [2_000, 16_000],
    list(range(100, 20_000, 900)),
]


@pytest.mark.parametrize("lengths", SKEWED, ids=["32k", "8k", "many short", "rising"])
def test_a_long_row_does_not_pad_its_batch(lengths):
    parts = list(passes(lengths))
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    assert padding_share(lengths, parts) < 0.35
    assert all(len(part) == 1 or max(lengths[i] for i in part) * len(part) <= 1 << 16 for part in parts)
    assert lengths[0] != 300 or padding_share(lengths, [list(range(len(lengths)))]) > 0.8, "what it was"


def test_rows_of_usual_lengths_are_one_pass():
    assert list(passes([20, 500, 512, 30, 512, 100, 60, 250])) == [list(range(8))]
    assert list(passes([])) == []


def test_every_process_makes_as_many_passes_of_rows_of_any_length():
    lengths = [200, 300, 300, 9_000, 9_500, 20_000, 30_000, 31_000]
    rows = Sequences.of(Sequence([1] * n, [1] * n, [1] * n) for n in lengths)
    batches = Batches(SimpleNamespace(sequences=rows), list(range(8)), 8, 4, 3, seed=0)
    shares = [list(batches.shares(list(range(8)), rank, 2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) > 1
    assert sorted(i for share in shares for part in share for i in part) == list(range(8))


def test_rows_of_one_conversation_are_held_out_together():
    rows = [Sequence([1, 2, 3], [0, 0, 1], [0, 0, 1], f"c{i // 3}") for i in range(60)]
    heldout, members = split(Sequences.of(rows), 2, seed=0)
    assert len(heldout) == 6 and sorted([*heldout, *members]) == list(range(60))
    assert not {rows[i].conversation for i in heldout} & {rows[i].conversation for i in members}


def test_what_an_earlier_row_of_the_conversation_has_is_not_learnt_again(tmp_path):
    ids = [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9, 9], [1, 7, 8]]
    masks = [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [0, 1, 1]]
    table = pyarrow.table({"input_ids": ids, "loss_mask": masks, "prompt": ["p", "p", None]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "manifest.json").write_text('{"digest": "d"}')
    rows, _ = read_sequences(tmp_path, 64, "all")
    assert [row.learnt for row in rows] == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 1, 1]]
    assert [row.answer for row in rows] == masks


def test_blocks_predict_what_follows_the_anchor(store, sequences, target):
    batch = Batches(store, list(range(20)), 4, 5, 3, seed=1).blocks([3, 7], step=0)
    for row, index in enumerate([3, 7]):
        ids = sequences[index].ids
        for block, anchor in enumerate(batch.anchors[row].tolist()):
            for k in range(3):
                assert bool(batch.valid[row, block, k]) == (anchor + k + 1 < len(ids))
                if batch.valid[row, block, k]:
                    assert batch.labels[row, block, k] == ids[anchor + k + 1]
                    (kept,) = store.rows([index])
                    assert torch.equal(
                        batch.hidden[row, batch.places[row, block, k]], kept[H_LAST][anchor + k]
                    )


def test_dead_features_are_refused(store):
    batches = Batches(store, list(range(20)), 4, 5, 3, seed=1)
    batches.check_alive()
    original = store.batch
    store.batch = lambda indices: (torch.ones_like(original(indices)[0]), *original(indices)[1:])
    with pytest.raises(DeepSpecError, match="features are the same for every token"):
        batches.check_alive()


def test_a_loss_without_gradients_stops_with_one_line(store, tmp_path):
    trainer = make_trainer(store, tmp_path / "work")
    trainer.raw.model.lm_head.weight.data.zero_()
    trainer.raw.model.markov_head.markov_w1.weight.data.zero_()
    trainer.raw.params = trainer.raw.params.model_copy(update={"confidence": 0.0})
    with pytest.raises(DeepSpecError, match="step 0: no weight has a gradient"):
        trainer.run()


class Noted(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory = "noted", False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.lines.append((step, values))


def test_steps_on_labels_alone_measure_no_overlap_and_held_out_text_does(store, tmp_path, monkeypatch):
    monkeypatch.setattr(DSparkModel, "outputs", lambda self, hidden, _: Outputs([(hidden, self.head)], None))
    trainer = make_trainer(store, tmp_path / "work", loss={"ce": 1.0, "tv": 0.0})
    trainer.run()
    for line in trainer.history:
        assert line["loss"] == line["ce"] > 0 and line["heldout_tau"] >= 1
        assert not {"tv", "train_tau"} & set(line), "not measured, so not told"


def test_metrics_go_to_a_tracker_where_one_is_set(store, tmp_path):
    trainer = make_trainer(store, tmp_path / "work")
    noted = Noted()
    trainer.accelerator = Accelerator(mixed_precision="no", cpu=True, log_with=noted)
    trainer.accelerator.init_trackers("deepspec")
    trainer.run()
    assert [step for step, _ in noted.lines] == [3, 6, 9]
    assert noted.lines[-1][1]["heldout_tau"] == trainer.history[-1]["heldout_tau"]


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """An empty store; the one that a test before this has set in this process would come before the variable's."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield
    mlflow.set_tracking_uri(None)


def test_a_training_that_fails_is_failed_in_mlflow_and_the_next_may_begin(tracked):
    params = load_params(ROOT / "params.smoke.yaml")
    for _ in range(2):
        accelerator = make_accelerator(params, "dspark")
        with pytest.raises(DeepSpecError, match="no longer answers"), tracked_to_its_end(accelerator):
            raise DeepSpecError("vLLM no longer answers")
    with tracked_to_its_end(make_accelerator(params, "dspark")):
        pass
    runs = mlflow.search_runs(experiment_names=["deepspec"], order_by=["start_time"])
    assert runs["status"].tolist() == ["FAILED", "FAILED", "FINISHED"]


def write_data(directory, rows, masks):
    import pyarrow as pa
    import pyarrow.parquet

    directory.mkdir()
    table = pa.table({"input_ids": rows, "loss_mask": masks})
    pyarrow.parquet.write_table(table, directory / "train.parquet")
    (directory / "manifest.json").write_text(json.dumps({"digest": "d"}))


def test_the_common_beginning_is_never_learnt(tmp_path):
    write_data(tmp_path / "data", [[1, 2, 3, 4, 5], [1, 2, 9, 8]], [[0, 0, 0, 1, 1], [0, 0, 0, 1]])
    everything, digest = read_sequences(tmp_path / "data", 4, "all")
    assert [s.learnt for s in everything] == [[0, 0, 1, 1], [0, 0, 1, 1]] and digest == "d"
    answers, _ = read_sequences(tmp_path / "data", 100, "answer")
    assert answers[0].learnt == [0, 0, 0, 1, 1]


def test_the_standard_deviation_of_a_channel_is_over_all_tokens(store):
    rows = [store.rows([i])[0] for i in (0, 1)]
    expected = torch.cat([torch.cat([row[layer] for row in rows]).float().std(0) for layer in (0, 1)])
    torch.testing.assert_close(channel_std(rows, (0, 1)), expected)


def test_a_drafter_may_have_a_loss_of_its_own():
    params = load_params(ROOT / "paper/params.smoke.yaml")
    assert own_loss(params, "dspark") is params
    assert (own_loss(params, "eagle3").train.loss.kl, params.train.loss.kl) == (1, 0)
    assert own_loss(params, "eagle3").train.steps == params.train.steps


def test_data_without_answers_is_refused(tmp_path):
    write_data(tmp_path / "data", [[1, 2, 3]], [[0, 0, 0]])
    with pytest.raises(DeepSpecError, match="no token to learn from"):
        read_sequences(tmp_path / "data", 100, "answer")
    with pytest.raises(DeepSpecError, match="run the generate stage first"):
        read_sequences(tmp_path / "nowhere", 100, "answer")


def test_the_draft_vocabulary_keeps_the_frequent_tokens_in_order():
    assert draft_vocabulary(np.bincount([7, 7, 3, 9, 9, 9, 9], minlength=12), 3).tolist() == [3, 7, 9]
    assert draft_vocabulary(np.bincount([7, 7, 3], minlength=12), 4).tolist() == [0, 1, 3, 7]


def test_a_stop_token_has_a_column_though_no_answer_ends():
    counts = np.bincount([7, 7, 3, 9, 9, 9, 9], minlength=12)
    assert draft_vocabulary(counts, 3, frozenset({11})).tolist() == [7, 9, 11]


def test_the_schedule_warms_up_and_decays_to_zero():
    values = [schedule(step, 100, 0.1) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1 and values[-1] < 0.01
