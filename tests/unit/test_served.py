"""A target that vLLM runs: exact ids of answers, its states asked for while training, and what goes wrong there."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from deepspec import retrying
from deepspec.answers.generate import generate_data
from deepspec.answers.params import GenerateParams
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.served import Servers
from deepspec.errors import DeepSpecError
from deepspec.features.codec import codec
from deepspec.features.extract import Extractor
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequences
from deepspec.features.served import ServedFeatures, ServedStates
from deepspec.features.states import engine_layers
from deepspec.target.ends import H_LAST, load_ends
from deepspec.training import run
from deepspec.training.paths import TrainingPaths
from tests.engine_files import write_states
from tests.engines import FakeEngine
from tests.tiny import cached_target
from tests.unit.test_ends import settings, write_data, write_family

LAYERS = (0, 2, H_LAST)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def ends():
    return load_ends(cached_target("llama"))


def counting(ids, most):
    return list(range(most))


def requests(count, **more):
    return iter([Request([1, 2, i], 4, id=i, **more) for i in range(count)])


def test_requests_carry_ids_sampling_and_seed_and_come_back_as_ids():
    asked = iter([Request([5, 6], 3, sampling=Sampling(0.7, 20, 0.9), seed=11, id="one")])
    with FakeEngine("vllm", counting) as engine:
        servers = Servers([f"{engine.url}/v1"])
        (found,) = servers.stream(frozenset({2}), lambda: next(asked, None))
    assert (found.id, found.tokens, found.finish_reason) == ("one", [0, 1, 2], "stop")
    body = engine.requests[0]
    assert body["prompt"] == [5, 6] and body["max_tokens"] == 3 and body["model"] == "served"
    assert [body[key] for key in ("temperature", "top_k", "top_p", "seed")] == [0.7, 20, 0.9, 11]
    assert body["stop_token_ids"] == [2] and body["return_token_ids"]


def test_several_servers_share_the_requests():
    with FakeEngine("vllm", counting) as one, FakeEngine("vllm", counting) as other:
        servers, asked = Servers([one.url, other.url], concurrency=2), requests(12)
        found = list(servers.stream(frozenset(), lambda: next(asked, None)))
    assert sorted(each.id for each in found) == list(range(12))
    assert len(one.requests) + len(other.requests) == 12 and min(len(one.requests), len(other.requests)) > 0


def test_a_server_that_goes_leaves_its_requests_to_the_other_and_the_last_one_is_told_in_one_line():
    with FakeEngine("vllm", counting) as one:
        with FakeEngine("vllm", counting) as other:
            servers = Servers([one.url, other.url], retries=2)
        asked = requests(5)
        assert len(list(servers.stream(frozenset(), lambda: next(asked, None)))) == 5
    asked = requests(2)
    with pytest.raises(
        DeepSpecError, match=r"vLLM no longer answers: .*run again: what is finished is kept"
    ) as error:
        list(servers.stream(frozenset(), lambda: next(asked, None)))
    assert "\n" not in str(error.value)


def test_nobody_at_an_address_is_told_at_once():
    with pytest.raises(DeepSpecError, match="no vLLM server answers"):
        Servers(["http://127.0.0.1:9"])
    with pytest.raises(DeepSpecError, match="is not an address like"):
        Servers(["localhost:8000"])


def test_an_answer_to_another_prompt_is_refused(monkeypatch):
    with FakeEngine("vllm", counting) as engine:
        post = engine.post
        monkeypatch.setattr(engine, "post", lambda path, body: post(path, body | {"prompt": [9, 9]}))
        with pytest.raises(DeepSpecError, match="it answered another prompt than it was asked"):
            Servers([engine.url]).decode(Request([1, 2], 4), frozenset())


def test_the_rows_are_those_of_our_own_engine(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "source": "seed", "turns": [f"question {i}", "and then?"][: 1 + i % 2]}
        for i in range(4)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = SimpleNamespace(seed=7, generate=GenerateParams(max_new_tokens=12, temperature=0.0))

    def continued(ids, most):
        return generate(target, None, ids, max_new_tokens=most)[0].tokens

    def made(name, **options):
        manifest = generate_data(target, params, prompts, tmp_path / name, tmp_path / "work", **options)
        assert manifest["rows"] == 4
        found = Dataset.from_parquet(
            str(tmp_path / name / "train.parquet"), cache_dir=str(tmp_path / f"{name}-c")
        )
        return found.sort("id").to_list()

    own = made("own")
    with FakeEngine("vllm", continued) as engine:
        servers = Servers([engine.url], concurrency=2)
        served = made("served", decode=lambda request: servers.stream(target.stop_ids, request))
    assert len(engine.requests) == 4 and {row["engine"] for row in served} == {"vllm"}
    assert [row | {"engine": "local"} for row in served] == own


class Writer:
    """Writes what the engine writes of a target; `change` spoils the n-th file."""

    def __init__(self, target, folder, layers, change=None, form="bf16"):
        self.target, self.folder, self.layers, self.change, self.form = target, folder, layers, change, form
        self.numbers, self.most, self.alone = itertools.count(), 0, threading.Lock()

    def __call__(self, ids):
        path = self.folder / f"cmpl-{next(self.numbers)}.safetensors"
        path.with_name(path.name + ".lock").touch()
        ids, layers = self.change(ids, self.layers) if self.change else (ids, self.layers)
        with self.alone:  # a target records one pass at a time
            write_states(path, self.target, ids, layers, form=self.form)
        self.most = max(self.most, len(list(self.folder.glob("*.safetensors"))))
        return f"/elsewhere/{path.name}"


@contextmanager
def served_states(target, ends, sequences, folder, change=None, form="bf16"):
    rows = Sequences.of(sequences)
    writer = Writer(target, folder, engine_layers(LAYERS, ends.num_layers), change, form)
    with FakeEngine("vllm", lambda ids, most: [0], states=writer) as engine:
        servers = Servers([engine.url], concurrency=3, folder=folder)
        yield ServedStates(servers, ends, rows, LAYERS, form), writer


def test_states_are_asked_for_proven_and_removed(target, ends, sequences, tmp_path):
    computed = Extractor(target, Sequences.of(sequences), LAYERS).rows([0, 4, 7, 9, 11])
    with served_states(target, ends, sequences, tmp_path) as (states, writer):
        states.check_layers()
        found = states.rows([0, 4, 7, 9, 11])
    for ours, theirs in zip(found, computed, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert list(tmp_path.iterdir()) == [] and writer.most <= 5


def of_another_request(ids, layers):
    return ids[::-1], layers


def a_middle_layer_on(ids, layers):
    return ids, [layer + (layer == 3) for layer in layers]


def all_layers_on(ids, layers):
    return ids, [min(layer + 1, 4) for layer in layers]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_request, "states of other tokens: "),
        (all_layers_on, "not the embedding of its tokens: layer ids that are off by one"),
        (a_middle_layer_on, r"under its layer id 3 are those of id 4 \(\+1\)"),
    ],
)
def test_states_of_something_else_stop_training_before_it_begins(
    target, ends, sequences, tmp_path, change, said
):
    with (
        served_states(target, ends, sequences, tmp_path, change) as (states, _),
        pytest.raises(DeepSpecError, match=said) as error,
    ):
        states.check_layers()
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_server_without_states_and_a_folder_that_is_another_are_told(
    target, ends, sequences, tmp_path, monkeypatch
):
    monkeypatch.setattr("deepspec.features.served.LATE_S", 0.05)
    rows = Sequences.of(sequences)
    with (
        FakeEngine("vllm", lambda ids, most: [0]) as engine,
        pytest.raises(DeepSpecError, match="names no file of hidden states"),
    ):
        ServedStates(Servers([engine.url], folder=tmp_path), ends, rows, LAYERS).rows([0])
    with (
        FakeEngine("vllm", lambda ids, most: [0], states=lambda ids: "/nowhere/x.safetensors") as engine,
        pytest.raises(DeepSpecError, match=r"is target\.vllm\.states_folder the folder that it writes to\?"),
    ):
        ServedStates(Servers([engine.url], folder=tmp_path), ends, rows, LAYERS).rows([0])


def test_batches_of_served_states_are_those_computed_online(target, ends, sequences, tmp_path):
    online = OnlineFeatures(target, sequences, LAYERS)
    with served_states(target, ends, sequences, tmp_path) as (states, _):
        served = ServedFeatures(states, ends, sequences, LAYERS)
        assert served.ahead and not online.ahead
        for one, other in zip(served.batch([3, 5]), online.batch([3, 5]), strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert served.describe() == online.describe() | {"computed_by": "engine"}


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_served_states_that_travel_encoded_are_those_that_are_encoded_here(
    target, ends, sequences, tmp_path, form
):
    rows = {}
    for name in ("bf16", form):
        (tmp_path / name).mkdir()
        with served_states(target, ends, sequences, tmp_path / name, form=name) as (states, _):
            states.check_layers()
            served = ServedFeatures(states, ends, sequences, LAYERS)
            rows[name] = states.rows([3])[0], served.rows([3])[0]
    assert served.describe()["form"] == form
    plain, read = rows["bf16"][0], rows[form][1]
    for layer in (0, 2):
        assert torch.equal(read[layer], codec(form).decode(codec(form).encode(plain[layer])))
    assert torch.equal(read[H_LAST], rows["bf16"][1][H_LAST])


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A target's directory, data to train on, and what opens servers of its states; none of its layers is loaded."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data/distill")
    directory = write_family(tmp_path / "target", "llama")
    from deepspec.target.model import load_target

    target = load_target(directory)
    monkeypatch.setattr(run, "load_target", None)
    opened = []

    @contextmanager
    def opens(layers, max_length, form):
        folder = tmp_path / f"states-{len(opened)}"
        folder.mkdir()
        opened.append(layers)
        writer = Writer(target, folder, layers, form=form if opens.encoding else "bf16")
        with FakeEngine("vllm", lambda ids, most: [0], states=writer) as engine:
            opens.engine = engine
            yield Servers([engine.url], concurrency=4, folder=folder)
            assert list(folder.iterdir()) == []

    opens.opened, opens.encoding = opened, True
    return SimpleNamespace(directory=directory, opens=opens)


def train(vllm, name, mode="online", form="bf16", **changes):
    params = settings()
    features = params.train.features.model_copy(update={"mode": mode, "form": form})
    params = params.model_copy(
        update={"train": params.train.model_copy(update={"features": features, **changes})}
    )
    root = Path(name)
    paths = TrainingPaths(root / "draft", root / "history.jsonl", root / "features.json")
    run.train(params, "dspark", vllm.directory, paths, vllm.opens)
    return paths


def test_a_draft_is_trained_on_states_that_servers_hand_out(vllm):
    online = train(vllm, "online")
    assert json.loads(online.manifest.read_text())["computed_by"] == "engine"
    shutil.rmtree(".deepspec/train")
    cached = train(vllm, "cached", "cached")
    assert (online.draft / "model.safetensors").read_bytes() == (
        cached.draft / "model.safetensors"
    ).read_bytes()
    shutil.rmtree(".deepspec/train")
    train(vllm, "again", "cached")
    assert len(vllm.opens.opened) == 2  # the third run finds the cache, and opens no server


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_draft_is_the_same_whichever_side_encodes_the_states(vllm, mode):
    drafts = []
    for encoding in (
        True,
        False,
    ):  # a server that is started here, and a running one with vLLM's own connector
        vllm.opens.encoding = encoding
        paths = train(vllm, f"{encoding}", mode, "fp8")
        drafts.append((paths.draft / "model.safetensors").read_bytes())
        shutil.rmtree(".deepspec")
    assert drafts[0] == drafts[1]


def test_a_run_whose_servers_die_goes_on_to_the_same_weights(vllm, monkeypatch):
    whole = train(vllm, "whole", save_every=1)
    shutil.rmtree(".deepspec/train")
    from deepspec.training.trainer import Trainer

    step = Trainer.train_step

    def dying(self):
        if self.step == 2:
            vllm.opens.engine.shutdown()
            vllm.opens.engine.server_close()
            raise DeepSpecError("vLLM no longer answers")
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", dying)
        with pytest.raises(DeepSpecError, match="no longer answers"):
            train(vllm, "broken", save_every=1)
    assert not Path("broken/draft").exists()
    seen = []
    monkeypatch.setattr(Trainer, "train_step", lambda self: (seen.append(self.step), step(self))[1])
    resumed = train(vllm, "broken", save_every=1)
    assert seen == [2, 3]
    assert (resumed.draft / "model.safetensors").read_bytes() == (
        whole.draft / "model.safetensors"
    ).read_bytes()
