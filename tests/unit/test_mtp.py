"""A target's next-token module drafts what an independent reader of its files computes, is trained and goes back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import BestFirst, Chain
from deepspec.drafters.algorithms.mtp import network
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import examine, load_drafter
from deepspec.drafters.loss_params import LossParams
from deepspec.drafters.params import MTPParams
from deepspec.errors import DeepSpecError
from deepspec.export.draft import load_draft
from deepspec.export.engines import export
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.ends import load_ends
from deepspec.target.model import load_target, resolve_target
from deepspec.target.next_token import FILE
from deepspec.target.weights import read_weights
from deepspec.training.adapt import load_adapting
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from tests.drafting import write as write_draft
from tests.next_token import FAMILIES, MODULE, Reader, write
from tests.tiny import cached_target

TEXT = torch.randint(2, 500, (15,), generator=torch.Generator().manual_seed(3)).tolist()
ANCHOR = 14


class Case:
    """A family's target, whole and as transformers has it."""

    def __init__(self, name: str, directory):
        self.name, self.family = name, FAMILIES[name]
        self.directory = write(self.family, directory)
        self.target = load_target(self.directory, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.reader = Reader(self.family, self.directory, model)
        with torch.no_grad():
            self.states = model.model(torch.tensor([TEXT[:ANCHOR]])).last_hidden_state[0]

    def drafted(self, drafter) -> tuple[list[int], torch.Tensor]:
        """Tokens that it draws behind the anchor, and the laws [γ, vocab] that they were drawn from."""
        session = drafter.session(1)
        session.begin(0)
        session.extend(0, TEXT[:ANCHOR], self.states)
        rng = torch.Generator().manual_seed(0)
        (proposal,) = session.propose([DraftRequest(0, TEXT[ANCHOR], Sampling(1.0), rng, 9, Chain())])
        return proposal.tokens, torch.stack([proposal.law(k) for k in range(len(proposal.tokens))])

    def drafts_as_read(self, drafter) -> None:
        tokens, laws = self.drafted(drafter)
        expected = self.reader.laws([*TEXT, *tokens], self.states, len(tokens))
        assert len(tokens) == 3
        torch.testing.assert_close(laws, expected, atol=1e-5, rtol=1e-4)

    def network(self, **section):
        return network(MTPParams(type="mtp", **section), self.target)

    def begun(self, **section):
        made = self.network(**section)
        made.share(self.target, torch.arange(self.target.vocab_size))
        return made


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("target"))


@torch.no_grad()
def test_the_targets_own_module_drafts_as_an_independent_reader_says(case):
    case.drafts_as_read(load_drafter(case.directory, case.target))


@pytest.mark.parametrize("shape", [Chain(), BestFirst(3, None, 8)], ids=["chain", "tree"])
def test_a_module_changes_no_token(case, shape):
    shape = shape if case.target.verdict.trees else Chain()
    drafter = load_drafter(case.directory, case.target)
    prompts = [TEXT, [8], TEXT[3:9]]
    plain, drafted = (
        generate(case.target, d, prompts, max_new_tokens=20, tree=shape) for d in (None, drafter)
    )
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]


@torch.no_grad()
def test_a_resolved_target_keeps_its_module(case, tmp_path):
    resolve_target(str(case.directory), None, "float32", tmp_path / "target")
    assert set(load_file(tmp_path / "target" / FILE)) == set(load_file(case.directory / MODULE))
    target = load_target(tmp_path / "target")
    case.drafts_as_read(load_drafter(tmp_path / "target", target))


@torch.no_grad()
def test_training_begins_with_the_module_and_says_the_same(case, tmp_path):
    """Its steps are unrolled with one shared set of keys; the reader computes each over all places anew."""
    begun = case.begun()
    drafter = load_drafter(write_draft(begun, case.target, tmp_path / "draft"), case.target)
    case.drafts_as_read(drafter)
    tokens, laws = case.drafted(drafter)
    text = torch.tensor([[*TEXT, *tokens]])
    features = torch.zeros(1, text.shape[1], case.states.shape[1])
    features[0, :ANCHOR] = case.states
    hidden = begun(features, text, torch.tensor([[ANCHOR]]))
    found = begun.outputs(hidden, text[:, ANCHOR : ANCHOR + 3][:, None]).logits()[0, 0].softmax(-1)
    torch.testing.assert_close(found, laws, atol=1e-5, rtol=1e-4)
    assert begun.origin.record["module"] == case.family.prefix.rstrip(".")


def test_a_drafts_file_has_the_names_and_weights_of_the_targets_checkpoint(case):
    """So it goes back by name."""
    published = load_file(case.directory / MODULE)
    stored = stored_weights(case.begun())
    assert set(stored) == set(published)
    assert all(torch.equal(stored[name], published[name].bfloat16()) for name in stored)


def test_self_distillation_trains_every_weight_and_helps(case):
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in (24, 30, 18, 27)]
    sequences = [Sequence(row, [1] * len(row), [1] * len(row)) for row in rows]
    model = case.begun()
    features = OnlineFeatures(case.target, sequences, model.config.target_layer_ids)
    (batch, *_) = Batches(features, [0, 1, 2, 3], 4, 5, 3, seed=0).make(0)
    objective = BlockObjective(model, LossParams())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = objective(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_a_module_that_is_used_as_it_is_is_not_trained(case, tmp_path):
    made = case.network(finetune=False, block_size=3)
    assert not any(p.requires_grad for p in made.parameters())
    published = load_file(case.directory / MODULE)
    assert all(torch.equal(w, published[name].bfloat16()) for name, w in stored_weights(made).items())


@pytest.mark.parametrize("resolved", [False, True])
@torch.no_grad()
def test_what_was_trained_goes_back_into_the_targets_checkpoint(case, resolved, tmp_path):
    """Engines read target and module from one directory; all of the target's own weights stay."""
    directory = case.directory
    if resolved:
        directory = tmp_path / "target"
        resolve_target(str(case.directory), None, "float32", directory)
    target = load_target(directory, dtype="float32")
    begun = network(MTPParams(type="mtp"), target)
    begun.share(target, torch.arange(target.vocab_size))
    begun.joins.weight.add_(
        torch.randn(begun.joins.weight.shape, generator=torch.Generator().manual_seed(1)) / 9
    )
    weights = stored_weights(begun)
    write_drafter(tmp_path / "draft", begun.description(), weights, target, {})
    record = export(
        load_draft("mtp", tmp_path / "draft", target), ["hf", "vllm", "sglang"], tmp_path / "exports"
    )
    assert record["passed"] and not any("refused" in entry for entry in record["engines"].values()), record
    for engine, says in (("vllm", '"method":"mtp"'), ("sglang", "NEXTN"), ("hf", "deepspec chat")):
        assert says in record["engines"][engine]["command"]
    stitched = tmp_path / "exports" / "vllm"
    whole = read_weights(stitched)
    assert set(whole) == set(read_weights(case.directory))
    assert all(torch.equal(whole[name], weight) for name, weight in weights.items())
    index = json.loads((stitched / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, file in index.items() if file == FILE} == set(weights)
    again = load_target(stitched, dtype="float32")
    (here,), (there,) = (generate(each, None, TEXT, max_new_tokens=8) for each in (target, again))
    assert here.tokens == there.tokens
    rounded = load_drafter(tmp_path / "draft", target)
    torch.testing.assert_close(case.drafted(load_drafter(stitched, again))[1], case.drafted(rounded)[1])


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return Case("DeepSeek-V3", tmp_path_factory.mktemp("deepseek"))


@torch.no_grad()
def test_training_goes_on_from_a_draft_of_the_module(deepseek, tmp_path):
    begun = deepseek.begun(block_size=2)
    begun.joins.weight.add_(torch.randn_like(begun.joins.weight) / 9)
    write_draft(begun, deepseek.target, tmp_path / "draft")
    on = deepseek.begun(start=str(tmp_path / "draft"))
    assert torch.equal(on.joins.weight, begun.joins.weight) and on.config.block_size == 3
    assert on.origin.record["directory"] == str(tmp_path / "draft")


@torch.no_grad()
def test_modules_alone_are_a_draft(deepseek, tmp_path):
    module = load_file(deepseek.directory / MODULE)
    save_file(module, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLMNextN"]}))
    deepseek.drafts_as_read(load_drafter(tmp_path, deepseek.target))


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tmp_path_factory):
    """A target with several modules, its reader, and what of the first tokens its states are."""
    family = FAMILIES["DeepSeek-V3"]
    directory = write(family, tmp_path_factory.mktemp("several"), modules=request.param)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model.model(torch.tensor([TEXT])).last_hidden_state[0]
    return load_target(directory, dtype="float32"), Reader(family, directory, model), states, request.param


def proposals(target, states, shape):
    """What is drafted behind two anchors of a text: the second round takes in what came between."""
    session = load_drafter(target.source, target).session(1)
    session.begin(0)
    start, rng = 0, torch.Generator().manual_seed(0)
    for anchor in (8, 11):
        session.extend(0, TEXT[start:anchor], states[start:anchor])
        (proposal,) = session.propose([DraftRequest(0, TEXT[anchor], Sampling(1.0), rng, 9, shape)])
        yield anchor, proposal
        start = anchor


@torch.no_grad()
def test_several_modules_draft_a_token_each_as_an_independent_reader_says(several):
    target, reader, states, modules = several
    for anchor, proposal in proposals(target, states, Chain()):
        assert len(proposal.tokens) == modules
        found = torch.stack([proposal.law(k) for k in range(modules)])
        expected = reader.laws_of_several([*TEXT[: anchor + 1], *proposal.tokens], states[:anchor], modules)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_path_of_a_tree_has_the_laws_of_its_own_tokens(several):
    target, reader, states, _ = several
    for anchor, proposal in proposals(target, states, BestFirst(3, None, 8)):
        assert max(proposal.depths) > 1 and not proposal.is_chain
        for node in range(len(proposal.tokens)):
            path, at = [], node
            while at >= 0:
                path.insert(0, proposal.tokens[at])
                at = proposal.parents[at]
            laws = reader.laws_of_several([*TEXT[: anchor + 1], *path], states[:anchor], len(path))
            chance = torch.stack([law[token] for law, token in zip(laws, path, strict=True)]).prod()
            assert proposal.survival[node] == pytest.approx(float(chance), rel=1e-3)


@pytest.mark.parametrize("shape", [Chain(), BestFirst(3, None, 8)], ids=["chain", "tree"])
def test_several_modules_change_no_token(several, shape):
    """Also behind prompts that are shorter than the modules are many."""
    target, _, _, modules = several
    drafter = load_drafter(target.source, target)
    assert drafter.block_size == modules
    prompts = [TEXT, [8], TEXT[3:9], [8, 9]]
    plain, drafted = (
        generate(target, each, prompts, max_new_tokens=20, tree=shape) for each in (None, drafter)
    )
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]
    assert all(max(g.stats.drafted) > 1 for g in drafted)


@torch.no_grad()
def test_several_modules_alone_are_a_draft(several, tmp_path):
    target, _, _, modules = several
    save_file(load_file(f"{target.source}/{MODULE}"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLMNextN"]}))
    assert examine(tmp_path).assumed == ()
    assert load_drafter(tmp_path, target).block_size == modules
    with pytest.raises(DeepSpecError, match="several next-token modules do not learn"):
        load_adapting(target.source, target)


@torch.no_grad()
def test_of_several_modules_of_another_shape_the_first_drafts(tmp_path):
    directory = write(FAMILIES["MiMo"], tmp_path / "target", modules=2)
    target = load_target(directory, dtype="float32")
    assert load_drafter(directory, target).block_size == 3
    (tmp_path / "alone").mkdir()
    save_file(load_file(directory / MODULE), tmp_path / "alone/model.safetensors")
    (tmp_path / "alone/config.json").write_text("{}")
    assert "not model.mtp_layers.1" in examine(tmp_path / "alone").assumed[0]


@torch.no_grad()
def test_a_module_may_bring_embeddings_and_a_head_of_its_own(deepseek, tmp_path):
    module = load_file(deepseek.directory / MODULE)
    heads = {"the target's": deepseek.reader.head, "another": torch.randn_like(deepseek.reader.head)}
    for own, head in heads.items():
        ends = {
            "model.layers.4.shared_head.head.weight": head,
            "model.layers.4.embed_tokens.weight": deepseek.reader.embed,
        }
        save_file(module | {name: w.clone() for name, w in ends.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        tokens, laws = deepseek.drafted(load_drafter(tmp_path, deepseek.target))
        reader = Reader.__new__(Reader)
        reader.__dict__ |= deepseek.reader.__dict__ | {"head": head}
        expected = reader.laws([*TEXT, *tokens], deepseek.states, 3)
        torch.testing.assert_close(laws, expected, atol=1e-5, rtol=1e-4, msg=own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("model.layers.4.enorm.weight"), r"model\.layers\.4\.enorm\.weight is missing"),
        (lambda m: m.pop("model.layers.4.shared_head.norm.weight"), r"shared_head\.norm\.weight is missing"),
        (
            lambda m: m.pop("model.layers.4.self_attn.o_proj.weight"),
            "missing weights of its next-token module",
        ),
        (
            lambda m: m.update({"model.layers.4.self_attn.sinks": torch.zeros(4)}),
            "unexpected weights of its next-token module",
        ),
        (
            lambda m: m.update({"model.layers.4.eh_proj.weight": torch.zeros(64, 64)}),
            r"eh_proj\.weight is \[64, 64\], expected \[64, 128\]",
        ),
        (
            lambda m: m.update({"model.layers.4.self_attn.o_proj.weight": torch.zeros(64, 3)}),
            "next-token module's layer",
        ),
    ],
    ids=["norm", "last norm", "layer", "unknown", "shape", "layer's shape"],
)
def test_a_module_that_is_not_whole_is_refused(change, message, deepseek, tmp_path):
    module = load_file(deepseek.directory / MODULE)
    change(module)
    save_file(module, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeepSpecError, match=message) as caught:
        load_drafter(tmp_path, deepseek.target)
    assert "\n" not in str(caught.value)


def test_a_target_without_a_module_has_none_to_use():
    target = load_target(cached_target("llama"))
    with pytest.raises(DeepSpecError, match=r"it has no next-token module \(MTP\)"):
        load_drafter(target.source, target)
    with pytest.raises(DeepSpecError, match=r"no next-token module \(MTP\) that could be used as it is"):
        network(MTPParams(type="mtp", finetune=False), target)


@pytest.mark.parametrize("load", [load_target, load_ends])
def test_without_one_it_begins_as_the_targets_last_layer(load):
    target = load(cached_target("llama"))
    model = network(MTPParams(type="mtp"), target)
    assert model.start == "target"
    model.share(target, torch.arange(target.vocab_size))
    model.init_from_target(target, torch.ones(target.hidden_size))
    whole = load_file(f"{target.source}/model.safetensors")
    assert torch.equal(model.decoder.layers[0].mlp.up_proj.weight, whole["model.layers.3.mlp.up_proj.weight"])
    assert torch.equal(model.decoder.norm.weight, whole["model.norm.weight"])
    assert torch.equal(model.joins.weight, torch.cat((torch.zeros(64, 64), torch.eye(64)), 1))
