"""A head of low rank: the best of its rank at first, refused where it makes no sense, a draft's life with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.config import Params, load_params
from deepspec.decoding.engine import generate
from deepspec.drafters.load import load_drafter
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.export.engines import export
from deepspec.export.reference import rounded, with_dense_head
from deepspec.target.ends import load_ends
from deepspec.target.model import load_target
from deepspec.training.paths import TrainingPaths
from deepspec.training.prepare import TrainingData, make_network, prepare
from deepspec.training.run import make_accelerator, train
from tests.drafting import make, write
from tests.exporting import LAYERS, make_draft
from tests.tiny import cached_target

ROOT = Path(__file__).parents[2]
TARGET = Path("data/target")
WHOLE = {"draft_vocab_size": 0}


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target("llama", layers=LAYERS))


def network(target, kind: str = "dspark", **sizes):
    algorithm = algorithms()[kind]
    params = algorithm.params(type=kind, **{"layers": 1, "block_size": 3, "target_layer_ids": [0, 1]} | sizes)
    torch.manual_seed(0)
    model = algorithm.network(params, target)
    columns = model.config.draft_vocab_size
    origin = model.origin
    model.share(target, torch.arange(columns) if origin is None or len(origin.ids) != columns else origin.ids)
    return model


def loud_states(count: int = 400) -> torch.Tensor:
    """States with a few loud channels, as targets have them."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 64, generator=rng) * torch.logspace(-1, 1, 64)


def squared_error(
    head: torch.Tensor, made: torch.Tensor, states: torch.Tensor, counts: torch.Tensor
) -> float:
    return float((((states @ (head - made).T).square()) * counts).sum())


def product(model) -> torch.Tensor:
    return model.low_rank_head.up.weight @ model.low_rank_head.down.weight


@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 16])
def test_a_head_begins_as_the_nearest_of_its_rank(rank, target):
    """No step off it makes it better, a plain truncation is worse, and a second time it is the same to the byte."""
    model = network(target, head_rank=rank, **WHOLE)
    states, counts = loud_states(), torch.randint(1, 50, (target.vocab_size,)).float()
    model.begin_low_rank(states, counts)
    head, made = target.head_weight.float(), product(model)
    assert torch.linalg.matrix_rank(made) == rank
    weighted = counts + 0.01 * counts.mean()
    least = squared_error(head, made, states, weighted)
    u, s, v = torch.linalg.svd(head, full_matrices=False)
    assert least < 0.9 * squared_error(head, (u[:, :rank] * s[:rank]) @ v[:rank], states, weighted)
    factors = model.low_rank_head.up.weight, model.low_rank_head.down.weight
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        up, down = (w + 1e-2 * w.std() * torch.randn(w.shape, generator=rng) for w in factors)
        assert squared_error(head, up @ down, states, weighted) > least
    again = network(target, head_rank=rank, **WHOLE)
    again.begin_low_rank(states, counts)
    assert torch.equal(again.low_rank_head.up.weight, factors[0])
    assert torch.equal(again.low_rank_head.down.weight, factors[1])
    assert float((states @ factors[1].T).std()) == pytest.approx(1.0, rel=0.2)


@torch.no_grad()
def test_a_head_of_full_rank_is_the_targets(target):
    model = network(target, head_rank=64, **WHOLE)
    model.begin_low_rank(loud_states(), torch.ones(target.vocab_size))
    torch.testing.assert_close(product(model), target.head_weight.float(), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_fewer_states_than_the_rank_make_a_head_all_the_same(target):
    model = network(target, head_rank=32, **WHOLE)
    model.begin_low_rank(loud_states(5), torch.zeros(target.vocab_size).index_fill_(0, torch.tensor([3]), 9))
    states = loud_states(5)
    assert torch.isfinite(product(model)).all()
    torch.testing.assert_close(
        states @ product(model).T, states @ target.head_weight.float().T, atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (
            {"head_rank": 8, "draft_vocab_size": 128},
            r"draft_vocab_size keeps 128 of 512 tokens; set draft_vocab_size: 0",
        ),
        ({"head_rank": 65, "draft_vocab_size": 0}, "head_rank 65 is above 64, the width of the states"),
    ],
)
def test_what_makes_no_sense_is_refused(sizes, says, target):
    with pytest.raises(DeepSpecError, match=says):
        network(target, **sizes)


def test_other_drafts_do_not_know_of_it(target):
    """Nothing of it is in their configuration, nor among their weights."""
    plain, low = network(target, **WHOLE), network(target, head_rank=8, **WHOLE)
    assert "head_rank" not in plain.description() and plain.description()["architectures"] == [
        "Qwen3DSparkModel"
    ]
    assert low.description()["architectures"] == ["DeepSpecDSparkModel"]
    assert set(low.state_dict()) - set(plain.state_dict()) == {
        "low_rank_head.down.weight",
        "low_rank_head.up.weight",
    }


def test_the_head_is_in_the_file_in_the_place_of_the_targets(target, tmp_path):
    for written_out in (False, True):
        path = write(make("dspark-low-rank", target), target, tmp_path / str(written_out), written_out)
        names = set(load_file(path / "model.safetensors"))
        assert {
            "low_rank_head.down.weight",
            "low_rank_head.up.weight",
        } <= names and "lm_head.weight" not in names


@torch.no_grad()
def test_a_draft_that_goes_on_keeps_its_head_and_another_gains_one(target, tmp_path):
    low = write(make("dspark-low-rank", target), target, tmp_path / "low")
    on = network(target, start=str(low), layers=1)
    assert on.config.head_rank == 8
    first = load_file(low / "model.safetensors")
    for name, weight in on.stored().items():
        torch.testing.assert_close(weight, first[name].float(), atol=1e-6, rtol=0)
    grown = network(
        target,
        "dflash2",
        start=str(write(make("dflash2", target), target, tmp_path / "d2")),
        head_rank=8,
        **WHOLE,
    )
    assert grown.low_rank_head is not None and not grown.origin.config.get("head_rank")
    for asked, says in (
        ({"head_rank": 16}, "has head_rank 8, which stays; 16 was asked for"),
        ({"head_rank": None}, "has head_rank 8, which stays; None was asked for"),
        ({"draft_vocab_size": 128}, "draft_vocab_size keeps 128 of 512 tokens"),
    ):
        with pytest.raises(DeepSpecError, match=says):
            network(target, start=str(low), **asked)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "dflash2"])
def test_engines_get_it_multiplied_out_and_the_same_law(kind, target, tmp_path):
    draft = make_draft(tmp_path, target, kind, head_rank=8, **WHOLE)
    record = export(draft, ["hf", "vllm", "speculators", "sglang", "llamacpp"], tmp_path / "exports")
    refused = {name: entry["refused"] for name, entry in record["engines"].items() if "refused" in entry}
    assert set(refused) == ({"vllm", "speculators", "sglang"} if kind == "dflash2" else {"sglang"})
    assert kind == "dflash2" or "SGLang drafts blocks with the target's head" in refused["sglang"]
    for name, entry in record["engines"].items():
        if name not in refused:
            assert entry["parity"]["passed"], (name, entry["parity"])
            told = [check["message"] for check in entry["parity"]["checks"] if check["name"] == "head"]
            assert len(told) == (name != "hf")
    weights = load_file(tmp_path / "exports" / "hf" / "model.safetensors")
    assert "low_rank_head.up.weight" in weights
    if kind != "dflash2":
        dense = load_file(tmp_path / "exports" / "vllm" / "model.safetensors")["lm_head.weight"].float()
        up, down = (weights[f"low_rank_head.{name}.weight"].float() for name in ("up", "down"))
        torch.testing.assert_close(dense, up @ down, atol=1e-2, rtol=1e-2)
        config = json.loads((tmp_path / "exports" / "vllm" / "config.json").read_text())
        assert "head_rank" not in config and "DeepSpec" not in config["architectures"][0]


def test_another_product_than_the_factors_is_found_out(target, tmp_path, monkeypatch):
    draft = make_draft(tmp_path, target, "dspark", head_rank=8, **WHOLE)

    def wrong(model, dtype):
        return with_dense_head(rounded(model, {"low_rank_head.up.weight"}, lambda w: 1.5 * w), dtype)

    for module in ("draft", "reference"):
        monkeypatch.setattr(f"deepspec.export.{module}.with_dense_head", wrong)
    record = export(draft, ["vllm"], tmp_path / "exports")
    failed = [c["name"] for c in record["engines"]["vllm"]["parity"]["checks"] if not c["passed"]]
    assert failed == ["head"]


def test_inspect_tells_the_rank(target, tmp_path):
    path = write(make("dspark-low-rank", target), target, tmp_path / "draft")
    said = CliRunner().invoke(app, ["inspect", str(path)])
    assert said.exit_code == 0 and "its own, of rank 8" in said.output
    assert "lm_head.weight" not in said.output


@pytest.fixture
def params(answered) -> Params:
    """The smoke profile for a few steps of a draft with such a head, where there are a tiny target and answers."""
    read = load_params(ROOT / "params.smoke.yaml")
    whole = read.model_dump(by_alias=True)
    whole["drafters"] = {
        "low": {"type": "dspark", "layers": 1, "block_size": 3, "markov_rank": 4, "head_rank": 8, **WHOLE}
    }
    whole["pipeline"] = ["low"]
    whole["train"] |= {"steps": 4, "eval_every": 4, "save_every": 4, "real_decode": False}
    return Params.model_validate(whole)


def test_a_draft_is_trained_saved_and_loaded_and_gone_on_from(params):
    """The head moves off its first weights, drafts losslessly, and a second training begins with it."""
    ends = load_ends(TARGET)
    begun = make_network(params, "low", ends)
    accelerator = make_accelerator(params, "low")
    prepare(
        params, "low", begun, ends, lambda: load_target(TARGET), TrainingData.read(params.train), accelerator
    )
    train(params, "low", TARGET, TrainingPaths.of("low"))
    stored = load_file("data/drafts/low/model.safetensors")
    for name in ("low_rank_head.up.weight", "low_rank_head.down.weight"):
        moved = (stored[name].float() - begun.state_dict()[name]).abs().max()
        assert 1e-3 < float(moved) < 1  # it began there, and was trained
    target = load_target(TARGET, dtype="float32")
    drafter = load_drafter("data/drafts/low", target)
    prompt = list(range(2, 20))
    (plain,) = generate(target, None, prompt, max_new_tokens=16)
    (drafted,) = generate(target, drafter, prompt, max_new_tokens=16)
    assert drafted.tokens == plain.tokens
    changed = params.drafters["low"].model_copy(update={"start": "data/drafts/low"})
    on = params.model_copy(update={"drafters": {"low": changed}})
    again = make_network(on, "low", ends)
    prepare(on, "low", again, ends, lambda: load_target(TARGET), TrainingData.read(on.train), accelerator)
    for name in ("low_rank_head.up.weight", "low_rank_head.down.weight"):
        torch.testing.assert_close(again.state_dict()[name], stored[name].float(), atol=0, rtol=0)
