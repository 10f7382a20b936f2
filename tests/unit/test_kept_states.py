"""States that are kept while the target answers: to the bit those that a pass over the conversations computes."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepspec import kernels as build
from deepspec.answers.generate import generate_data
from deepspec.config import Params, load_params
from deepspec.decoding.engine import Engine, stream
from deepspec.decoding.recorder import Recorded, Recorder
from deepspec.decoding.request import Request, Sampling
from deepspec.features import kept
from deepspec.features.extract import LOG_NORM, Extractor
from deepspec.features.kept import KEPT, RECORD, Keeper
from deepspec.features.sequences import Sequence, Sequences
from deepspec.target.ends import H_LAST, load_ends
from deepspec.target.model import Target, load_target
from deepspec.training import keeping
from deepspec.training.keeping import keeper
from deepspec.training.prepare import TrainingData, stored_features
from deepspec.training.run import make_accelerator
from tests.drafting import Guesser
from tests.tiny import cached_target

ROOT = Path(__file__).parents[2]
LAYERS = (0, 2)
pytestmark = pytest.mark.skipif(build.kernels() is None, reason=f"kernels {build.state()}")


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def target(request) -> Target:
    return load_target(cached_target(request.param), dtype="bfloat16", device="cpu")


def requests() -> list[Request]:
    """Prompts that begin alike and a long one, sampled and greedy, that end early, at once and at their limit."""
    shared = list(range(5, 40))
    prompts = [[*shared, 50], [*shared, 51, 52], [7], list(range(100, 400)), shared, [9, 10]]
    return [
        Request(ids, (1, 9, 30, 4, 17, 25)[i], sampling=Sampling((0.0, 1.0)[i % 2]), seed=i, id=i)
        for i, ids in enumerate(prompts)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_what_decoding_leaves_is_what_a_pass_over_the_finished_text_computes(target, batch_size):
    waiting, recorder = iter(requests()), Recorder(target, LAYERS)
    found = list(stream(target, None, lambda: next(waiting, None), batch_size, recorder))
    plain = iter(requests())
    expected = {one.id: one.tokens for one in stream(target, None, lambda: next(plain, None), batch_size)}
    assert {one.id: one.tokens for one in found} == expected
    texts = {one.id: [*one.prompt_ids, *one.tokens] for one in found}
    rows = Sequences.of(Sequence(ids, [1] * len(ids), [1] * len(ids)) for ids in texts.values())
    computed = Extractor(target, rows, LAYERS).rows(list(range(len(texts))))
    for id, row in zip(texts, computed, strict=True):
        recorded = recorder.take(id)
        assert recorded is not None and recorder.take(id) is None
        assert torch.equal(recorded.log_norm, row[LOG_NORM])
        for layer in (*LAYERS, H_LAST):
            assert torch.equal(recorded.states[layer], row[layer]), (id, layer)


def test_a_failed_request_leaves_nothing_and_the_others_all(target, monkeypatch):
    recorder, broken = Recorder(target, LAYERS), list(range(30, 60))
    real = target.forward

    def forward(ids, step):
        hidden = real(ids, step)
        if step.judged and engine.slots[0].request.id == 1:
            step.logits = target.logits(hidden[0]).index_fill(0, torch.tensor([0]), torch.nan)
        return hidden

    monkeypatch.setattr(target, "forward", forward)
    engine = Engine(target, recorder=recorder)
    waiting = iter([Request(broken, 4, id=1), Request(broken, 4, id=2), Request([], 4, id=3)])
    ends = {one.id: one.finish_reason for one in engine.run(lambda: next(waiting, None))}
    assert ends == {1: "error", 2: "length", 3: "error"}
    recorded = recorder.take(2)
    assert recorded is not None and len(recorded.log_norm) == 34
    assert recorder.take(1) is None and recorder.take(3) is None


def test_states_are_recorded_of_plain_decoding_alone(target):
    with pytest.raises(ValueError, match="nothing is drafted"):
        Engine(target, Guesser({}), recorder=Recorder(target, LAYERS))


@pytest.fixture
def params() -> Params:
    """The smoke profile with two drafters that want different layers."""
    whole = load_params(ROOT / "params.smoke.yaml").model_dump(by_alias=True)
    whole["drafters"] = {
        "block": {
            "type": "dspark",
            "layers": 1,
            "block_size": 3,
            "markov_rank": 4,
            "target_layer_ids": [0, 1],
        },
        "heads": {"type": "medusa", "heads": 3},
    }
    whole["pipeline"] = ["block", "heads"]
    whole["train"] |= {"heldout": 2, "max_length": 256}
    whole["generate"] |= {"batch_size": 3, "max_new_tokens": 12, "max_length": 256}
    return Params.model_validate(whole)


@pytest.fixture
def answered(tmp_path, monkeypatch) -> Target:
    """A target in bfloat16 and prompts, some of two turns, where the stages look for them."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/target").symlink_to(cached_target("llama", dtype=torch.bfloat16))
    turns = [["one word"], ["two words", "and then?"], ["one word more"], ["a longer one, of several words"]]
    rows = [{"id": f"p{i}", "source": "seed", "turns": turns[i % 4]} for i in range(12)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_target("data/target")


def answer(params: Params, target: Target, keeping: Keeper | None) -> str:
    """Answer the prompts anew; return the digest of the data set."""
    found = generate_data(target, params, "prompts.jsonl", "data/distill", Path("work"), keeper=keeping)
    assert found is not None and found["failures"] == 0
    return found["digest"]


def stored(params: Params, layers: tuple[int, ...]) -> dict:
    """Store features as training does; return the checksums of its shards and the layers that they are of."""
    ends, accelerator = load_ends("data/target"), make_accelerator(params)
    body, data = (lambda: load_target("data/target")), TrainingData.read(params.train)
    return stored_features(params.train, ends, body, data, layers, accelerator).manifest


def test_training_stores_what_was_kept_and_computes_what_was_not(params, answered, monkeypatch):
    without = answer(params, answered, None)
    computed = {layers: stored(params, layers) for layers in ((0, 1), (H_LAST,))}
    shutil.rmtree(".deepspec/features")
    shutil.rmtree("work")
    assert answer(params, answered, keeper(params, answered)) == without
    (folder,) = KEPT.iterdir()
    files = sorted(folder.glob("*.safetensors"))
    assert folder.name == without and len(files) == 12
    assert json.loads((folder / RECORD).read_text())["layers"] == [0, 1]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:100])
    passed = []
    real = Extractor.rows
    monkeypatch.setattr(
        Extractor, "rows", lambda self, indices: passed.extend(indices) or real(self, indices)
    )
    found = stored(params, (0, 1))
    assert len(passed) == 2 and found == computed[0, 1]  # checksums too
    assert not folder.exists()
    assert stored(params, (H_LAST,))["layers"] == [0, 1] and len(passed) == 2  # of the same shards


def test_layers_that_were_not_kept_are_computed(params, answered):
    answer(params, answered, keeper(params, answered))
    assert stored(params, (0, 2))["layers"] == [0, 2]
    assert len(list(KEPT.glob("*/*.safetensors"))) == 12  # for the drafters that were named


def test_codes_are_kept_where_features_are_stored_as_codes(params, answered):
    compact = params.model_copy(deep=True)
    compact.train.features.__dict__["form"] = "int8"
    answer(compact, answered, None)
    computed = stored(compact, (0, 1))
    shutil.rmtree(".deepspec/features")
    shutil.rmtree("work")
    answer(compact, answered, keeper(compact, answered))
    assert stored(compact, (0, 1)) == computed and not list(KEPT.iterdir())


def test_kept_states_go_where_features_are_there_already(params, answered):
    answer(params, answered, None)
    computed = stored(params, (0, 1))
    shutil.rmtree("work")
    answer(params, answered, keeper(params, answered))
    assert list(KEPT.iterdir())
    assert stored(params, (0, 1)) == computed and not list(KEPT.iterdir())
    assert len(list(Path(".deepspec/features").iterdir())) == 1


def test_a_finished_data_set_leaves_no_states_of_another(params, answered):
    others = params.model_copy(update={"seed": 5})
    first = answer(others, answered, keeper(others, answered))
    assert [folder.name for folder in KEPT.iterdir()] == [first]
    second = answer(params, answered, keeper(params, answered))
    assert [folder.name for folder in KEPT.iterdir()] == [second] != [first]
    assert answer(params, answered, keeper(params, answered)) == second  # again, with nothing left to answer
    assert len(list((KEPT / second).glob("*.safetensors"))) == 12


@pytest.mark.parametrize("changed", ["form", "code"])
def test_states_that_training_cannot_use_any_more_go(params, answered, monkeypatch, changed):
    answer(params, answered, keeper(params, answered))
    if changed == "code":
        monkeypatch.setattr(kept, "code_digest", lambda *_: "other")
    else:
        params = params.model_copy(deep=True)
        params.train.features.__dict__["form"] = "fp8"
    assert stored(params, (0, 1))["shards"] and not list(KEPT.iterdir())


def test_states_that_are_no_numbers_are_not_kept(params, answered):
    own = keeper(params, answered)
    assert own is not None
    own.begin("work")
    states = {layer: torch.zeros(3, 64).bfloat16() for layer in own.recorder.layers}
    own.keep([1, 2, 3], Recorded(states, torch.tensor([1.0, torch.nan, 2.0])))
    assert not KEPT.exists()
    own.keep([1, 2, 3], Recorded(states, torch.tensor([1.0, 1.5, 2.0])))
    assert len(list((KEPT / "work").glob("*.safetensors"))) == 1


def test_shards_of_more_layers_are_read_before_unfinished_ones_of_fewer(params, answered):
    answer(params, answered, None)
    manifest = stored(params, (0,))
    (narrow,) = Path(".deepspec/features").iterdir()
    answer_to = json.loads((narrow / "manifest.json").read_text())
    (narrow / "manifest.json").write_text(json.dumps(answer_to | {"shards": []}))  # as a killed run leaves it
    wide = stored(params, (0, 1))
    assert wide["layers"] == [0, 1] and manifest["layers"] == [0]
    assert stored(params, (0,)) == wide


def out_of_room(monkeypatch) -> str:
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept, "save_file", full)
    return "No space left on device"


def nearly_out_of_room(monkeypatch) -> str:
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=kept.SPARE - 1))
    return "no more than 1023 MiB of the disk are free"


@pytest.mark.parametrize("disk", [out_of_room, nearly_out_of_room])
def test_a_full_disk_ends_the_keeping_with_one_warning_and_no_answer_is_lost(
    params, answered, monkeypatch, caplog, disk
):
    why = disk(monkeypatch)
    with caplog.at_level(logging.WARNING):
        answer(params, answered, keeper(params, answered))
    assert [r.getMessage() for r in caplog.records if "kept" in r.getMessage()] == [
        f"{KEPT / next(Path('work').iterdir()).name}: no more states are kept, training computes the others: {why}"
    ]
    assert stored(params, (0, 1))["shards"]


def test_states_that_would_fill_the_memory_are_not_kept(params, answered, monkeypatch, caplog):
    monkeypatch.setattr(keeping.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with caplog.at_level(logging.INFO):
        assert keeper(params, answered) is None
    assert "of memory would be needed" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "online"},
        {"directory": "elsewhere"},
        {"states": "somewhere"},
    ],
)
def test_nothing_is_kept_where_training_reads_none_of_it(params, answered, change):
    features = params.train.features.model_copy(update=change)
    other = params.model_copy(update={"train": params.train.model_copy(update={"features": features})})
    assert keeper(other, answered) is None
    assert keeper(params, load_target("data/target", dtype="float32")) is None  # no kernels
    assert keeper(params.model_copy(update={"pipeline": []}), answered) is None
