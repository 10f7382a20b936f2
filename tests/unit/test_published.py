"""Drafts in the styles of other trainers draft what an independent reader of those styles computes, or say why not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Chain
from deepspec.drafters.load import examine, load_drafter, open_draft
from deepspec.drafters.published.vocabulary import draft_ids
from deepspec.errors import DeepSpecError
from deepspec.export.reference import network
from deepspec.target.model import load_target
from tests.exporting import make_draft, written
from tests.published import LAYERS, SIZES, VOCAB, D, Draft, Reference, Weights, block, eagle3
from tests.tiny import SCALINGS, make_target

TEXT = torch.randint(2, VOCAB, (19,), generator=torch.Generator().manual_seed(3)).tolist()
ANCHOR = 18  # the last token of the text
DEFAULT = [
    2,
    LAYERS // 2,
    LAYERS - 3,
]  # of transformers' hidden_states: what engines read where nothing is said
LLAMA3, YARN = SCALINGS["llama3"], SCALINGS["yarn"]
GONE = object()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("published"), "qwen3", VOCAB, LAYERS, D)


@pytest.fixture(scope="module")
def target(directory):
    return load_target(directory, dtype="float32")


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def states(model):
    """transformers' hidden_states of the text before the anchor, each [n, d]."""
    with torch.no_grad():
        found = model(torch.tensor([TEXT[:ANCHOR]]), output_hidden_states=True).hidden_states
    return [state[0] for state in found]


def flat(draft: Draft, **changes) -> Draft:
    """Change keys of its config.json; GONE takes one out."""
    draft.config |= changes
    draft.config = {key: value for key, value in draft.config.items() if value is not GONE}
    return draft


def speculators(draft: Draft, kind: str, **outer) -> Draft:
    """The same draft with its sizes in `transformer_layer_config`."""
    outside = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    own = {key: draft.config.pop(key) for key in outside if key in draft.config}
    draft.config.pop("architectures", None)
    verifier = {"name_or_path": "someone/target", "architectures": ["Qwen3ForCausalLM"]}
    methods = [{"proposal_type": "greedy", "speculative_tokens": draft.gamma}]
    draft.config = {
        "architectures": ["Speculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.5.0",
        "speculators_config": {"algorithm": kind, "proposal_methods": methods, "verifier": verifier},
        "transformer_layer_config": draft.config,
        **own,
        **outer,
    }
    return draft


def scaled(draft: Draft, rope: dict, **keys) -> Draft:
    """With a rotary embedding that is said in `keys`."""
    draft.rope = {"rope_theta": 10000.0, "rope_type": "default", **rope}
    return flat(draft, **keys)


def windowed(draft: Draft, window: int | None, causal: bool) -> Draft:
    draft.window, draft.causal = window, causal
    return draft


def eagle_config(ids: list[int], **more) -> dict:
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True, **more}}


def with_four_gamma(draft: Draft) -> Draft:
    draft.gamma = 4
    return draft


RED_HAT = ("norm_before_residual", "fc_norm", "norm_output")
DFLASH = {"mask_token_id": VOCAB - 2, "target_layer_ids": [1, 3, 4]}
DSPARK = DFLASH | {"projector_type": "dspark", "markov_rank": 8, "markov_head_type": "vanilla"}
CONFIDENT = {"enable_confidence_head": True, "confidence_head_with_markov": True}
SELECTS = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 5}
HALF = {"partial_rotary_factor": 0.5}
SLIDES = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "use_sliding_window": True}

STYLES = {
    "SafeAILab: a config of Llama, no layers named, no RoPE base": lambda: flat(
        eagle3(DEFAULT), architectures=["LlamaForCausalLM"], head_dim=GONE, num_key_value_heads=GONE
    ),
    "SpecForge, with embeddings, a prefix and a RoPE base": lambda: scaled(
        eagle3(DEFAULT, own_embeddings=True, prefix="model.", first="midlayer."),
        {"rope_theta": 5e5},
        rope_theta=5e5,
    ),
    "SpecForge for gpt-oss: outputs named in eagle_config": lambda: flat(
        eagle3([2, 4, 6]), **eagle_config([1, 3, 5])
    ),
    "NVIDIA: inputs in eagle_config, llama3 RoPE, a norm before fc": lambda: scaled(
        eagle3([2, 4, 5], norms=("norm_before_fc",)),
        LLAMA3,
        rope_scaling=LLAMA3,
        rope_theta=10000.0,
        **eagle_config([2, 4, 5], use_input_layernorm_in_first_layer=True, norm_before_fc=True),
    ),
    "AngelSlim: ids in place of offsets, tied on paper": lambda: flat(
        eagle3(DEFAULT, as_ids=True), architectures=["Eagle3LlamaForCausalLM"], tie_word_embeddings=True
    ),
    "vLLM: inputs named at the top, counted from the end": lambda: flat(
        eagle3([2, 4, 6]), eagle_aux_hidden_state_layer_ids=[2, 4, -3]
    ),
    "EAGLE-3.1 in one level": lambda: flat(
        eagle3(DEFAULT, norms=("fc_norm",), columns=None), fc_norm=True, norm_output=True
    ),
    "DeepSeek's EAGLE-3: q/k norms, whole vocabulary, outputs": lambda: flat(
        eagle3([1, 3, 5, 6], columns=None, qk_norm=True, first="layers.0."),
        architectures=["Qwen3Eagle3Model"],
        target_layer_ids=[0, 2, 4, 5],
        num_target_layers=LAYERS,
        ttt_length=5,
    ),
    "RedHat's EAGLE-3.1, two layers, yarn": lambda: speculators(
        scaled(
            eagle3(
                [2, 4, 5],
                layers=2,
                first="layers.0.",
                norms=RED_HAT,
                norm_before_residual=True,
                fc_norm=True,
                norm_output=True,
            ),
            YARN,
            rope_parameters=YARN | {"rope_theta": 10000.0},
        ),
        "eagle3",
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
    ),
    "speculators' EAGLE-3 in Qwen3's layer, within a window": lambda: speculators(
        windowed(
            eagle3(
                [2, 4, 5],
                qk_norm=True,
                first="layers.0.",
                layer_types=["sliding_attention"],
                sliding_window=6,
            ),
            6,
            True,
        ),
        "eagle3",
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
    ),
    "RoPE of a part of a head, scaled linearly": lambda: scaled(
        eagle3(DEFAULT),
        HALF | {"rope_type": "linear", "factor": 2.0},
        rope_scaling={"type": "linear", "factor": 2.0},
        **HALF,
    ),
    "P-EAGLE as vLLM reads it": lambda: flat(
        eagle3(DEFAULT, parallel=True), pard_token=VOCAB - 2, num_depths=4, parallel_drafting=True
    ),
    "speculators' P-EAGLE, two layers": lambda: speculators(
        eagle3([2, 4, 5], layers=2, first="layers.0.", parallel=True),
        "peagle",
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
        mask_token_id=VOCAB - 2,
        num_depths=4,
    ),
    "z-lab's DFlash": lambda: scaled(
        block([2, 4, 5], 4, architectures=["DFlashDraftModel"], block_size=4, dflash_config=DFLASH),
        {"rope_theta": 1e6},
        rope_theta=1e6,
    ),
    "z-lab's DFlash, no layers and no base named": lambda: scaled(
        block(
            [2, 6],
            4,
            architectures=["DFlashDraftModel"],
            block_size=4,
            dflash_config={"mask_token_id": VOCAB - 2},
        ),
        {"rope_theta": 1e6},
    ),
    "z-lab's DFlash with windows, which are causal": lambda: scaled(
        windowed(
            block(
                [2, 4, 5], 4, architectures=["DFlashDraftModel"], block_size=4, dflash_config=DFLASH, **SLIDES
            ),
            6,
            True,
        ),
        HALF,
        rope_theta=10000.0,
        **HALF,
    ),
    "z-lab's DFlash 2, windows both ways": lambda: windowed(
        scaled(
            block(
                [2, 4, 5],
                4,
                selector=True,
                architectures=["DFlash2DraftModel"],
                is_causal=False,
                dflash_config=DFLASH | SELECTS | {"block_size": 4},
                **SLIDES,
            ),
            {"rope_theta": 1e6},
            rope_parameters={"rope_theta": 1e6},
        ),
        6,
        False,
    ),
    "speculators' DFlash 2": lambda: speculators(
        scaled(block([2, 4, 5], 4, selector=True), {}, rope_theta=10000.0),
        "dflash2",
        block_size=4,
        aux_hidden_state_layer_ids=[2, 4, 5],
        mask_token_id=VOCAB - 2,
        **SELECTS,
    ),
    "SpecForge's DSpark": lambda: scaled(
        block(
            [2, 4, 5],
            4,
            rank=8,
            confidence=True,
            from_anchor=True,
            architectures=["DSparkDraftModel"],
            block_size=4,
            dflash_config=DSPARK | CONFIDENT,
        ),
        {"rope_theta": 1e6},
        rope_theta=1e6,
    ),
    "DeepSeek's DSpark, gated, RoPE by yarn": lambda: scaled(
        block(
            [2, 4, 5],
            4,
            rank=8,
            head="gated",
            confidence=True,
            from_anchor=True,
            architectures=["Qwen3DSparkModel"],
            block_size=4,
            target_layer_ids=[1, 3, 4],
            mask_token_id=VOCAB - 2,
            markov_rank=8,
            markov_head_type="gated",
            **CONFIDENT,
        ),
        YARN,
        rope_parameters=YARN | {"rope_theta": 10000.0},
    ),
    "RedHat's DFlash, reduced vocabulary, windows both ways": lambda: speculators(
        scaled(windowed(block([2, 4, 5], 4, columns=100, **SLIDES), 6, False), {}, rope_theta=10000.0),
        "dflash",
        draft_vocab_size=100,
        block_size=4,
        aux_hidden_state_layer_ids=[2, 4, 5],
        mask_token_id=VOCAB - 2,
        sliding_window_non_causal=True,
    ),
    "RedHat's DSpark": lambda: speculators(
        scaled(
            block([2, 4, 5], 4, columns=100, rank=8, confidence=True, from_anchor=True),
            {},
            rope_theta=10000.0,
        ),
        "dspark",
        draft_vocab_size=100,
        block_size=4,
        aux_hidden_state_layer_ids=[2, 4, 5],
        mask_token_id=VOCAB - 2,
        markov_rank=8,
    ),
}


def drafted(drafter, states) -> tuple[list[int], torch.Tensor]:
    """Tokens that it draws behind the anchor, and the laws [γ, vocab] that they were drawn from."""
    session = drafter.session(1)
    session.begin(0)
    # Our convention: layer i is its output, hidden_states[i + 1] of transformers.
    session.extend(0, TEXT[:ANCHOR], torch.cat([states[layer + 1] for layer in drafter.layers], -1))
    rng = torch.Generator().manual_seed(0)
    (proposal,) = session.propose([DraftRequest(0, TEXT[ANCHOR], Sampling(1.0), rng, 9, Chain())])
    return proposal.tokens, torch.stack([proposal.law(k) for k in range(len(proposal.tokens))])


def reference(draft: Draft, model, states) -> Reference:
    return Reference(
        draft,
        model.get_input_embeddings().weight.detach(),
        model.get_output_embeddings().weight.detach(),
        states,
    )


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_a_draft_of_another_trainer_drafts_as_its_style_says(style, target, model, states, tmp_path):
    draft = STYLES[style]()
    drafter = load_drafter(draft.write(tmp_path / "draft"), target)
    tokens, laws = drafted(drafter, states)
    assert len(tokens) == draft.gamma
    expected = reference(draft, model, states).laws([*TEXT, *tokens], ANCHOR)
    torch.testing.assert_close(laws, expected, atol=1e-5, rtol=1e-4)
    (plain,), (fast,) = (generate(target, d, TEXT, max_new_tokens=12) for d in (None, drafter))
    assert plain.tokens == fast.tokens


@pytest.mark.parametrize(
    "style",
    [
        name
        for name in STYLES
        if any(part in name for part in ("RedHat's EAGLE", "window", "DFlash 2", "P-EAGLE"))
    ],
)
@torch.no_grad()
def test_the_network_in_training_says_the_same(style, target, states, tmp_path):
    """So a draft can be trained on from where it is."""
    draft = STYLES[style]()
    kind, checkpoint = open_draft(draft.write(tmp_path / "draft"), target)
    tokens, laws = drafted(load_drafter(tmp_path / "draft", target), states)
    trained = network(kind, checkpoint, target, torch.float32)
    text = torch.tensor([[*TEXT, *tokens]])
    features = torch.zeros(1, text.shape[1], len(trained.config.target_layer_ids) * D)
    features[0, :ANCHOR] = torch.cat([states[i + 1] for i in trained.config.target_layer_ids], -1)
    hidden = trained(features, text, torch.tensor([[ANCHOR]]))
    outputs = trained.outputs(hidden, text[:, ANCHOR : ANCHOR + len(tokens)][:, None])
    expected = outputs.logits()[0, 0].softmax(-1)
    torch.testing.assert_close(laws[:, trained.draft_ids], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["bin", "shards"])
@torch.no_grad()
def test_weights_may_be_pytorchs_own_or_in_shards(form, target, model, states, tmp_path):
    draft = eagle3(DEFAULT)
    tokens, laws = drafted(load_drafter(draft.write(tmp_path, form), target), states)
    expected = reference(draft, model, states).laws([*TEXT, *tokens], ANCHOR)
    torch.testing.assert_close(laws, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_medusa_of_fasterdecoding_in_pytorchs_own_file_loads(target, tmp_path):
    made = Weights()
    for head in range(2):
        made.matrix(f"{head}.0.linear", D, D)
        made.named[f"{head}.0.linear.bias"] = torch.randn(D, generator=made.rng)
        made.matrix(f"{head}.1", VOCAB, D)
    torch.save(made.named, tmp_path / "medusa_lm_head.pt")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    hidden = torch.randn(3, D)
    found = load_drafter(tmp_path, target).logits(hidden)
    for head in range(2):
        linear = hidden @ made.named[f"{head}.0.linear.weight"].T + made.named[f"{head}.0.linear.bias"]
        state = hidden + linear * linear.sigmoid()
        torch.testing.assert_close(
            found[:, head], state @ made.named[f"{head}.1.weight"].T, atol=1e-4, rtol=1e-4
        )


def with_weight(draft: Draft, name: str, *shape: int) -> Draft:
    draft.weights[name] = torch.zeros(*shape)
    return draft


def without(draft: Draft, *names: str) -> Draft:
    draft.weights = {name: weight for name, weight in draft.weights.items() if name not in names}
    return draft


def dflash(**changes) -> Draft:
    own = {"architectures": ["DFlashDraftModel"], "block_size": 4, "dflash_config": DFLASH, "rope_theta": 1e6}
    return flat(block([2, 4, 5], 4, **own), **changes)


REFUSED = {
    r"names no mask token \(mask_token_id, pard_token, ptd_token_id\)": lambda: eagle3(
        DEFAULT, parallel=True
    ),
    "a next-token module of the target's own": lambda: speculators(eagle3(DEFAULT), "mtp"),
    "speculators_model_type 'novel' is not run here": lambda: speculators(eagle3(DEFAULT), "novel"),
    "rope_type 'dynamic' is not run here; known: default, linear": lambda: flat(
        eagle3(DEFAULT), rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "rope_type 'yarn' lacks factor": lambda: flat(eagle3(DEFAULT), rope_scaling={"rope_type": "yarn"}),
    "attention_bias is set: projections with biases are not run here": lambda: flat(
        eagle3(DEFAULT), attention_bias=True
    ),
    "hidden_act 'gelu' is not run here, only 'silu'": lambda: flat(eagle3(DEFAULT), hidden_act="gelu"),
    r"its weights are quantised \(fp8\)": lambda: flat(
        eagle3(DEFAULT), quantization_config={"quant_method": "fp8"}
    ),
    "the draft is 64 wide and its target 128": lambda: flat(eagle3(DEFAULT), target_hidden_size=128),
    "names 4 layers of the target, but fc reads 3 states": lambda: flat(
        eagle3(DEFAULT), eagle_aux_hidden_state_layer_ids=[1, 2, 3, 4]
    ),
    r"names target layers \[2, 5, 40\], and the target has 8": lambda: flat(
        eagle3(DEFAULT), eagle_aux_hidden_state_layer_ids=[2, 5, 40]
    ),
    "target layer 7 cannot be a feature": lambda: flat(eagle3(DEFAULT), target_layer_ids=[1, 3, 7]),
    "names no layers of the target, and fc reads 2 states": lambda: eagle3([2, 4]),
    r"layer 1 reads the embeddings beside the state \(128 wide\)": lambda: with_weight(
        eagle3(DEFAULT), "layers.1.self_attn.q_proj.weight", 64, 128
    ),
    "vocab_size is 512, but the target|vocab_size is 600": lambda: flat(eagle3(DEFAULT), vocab_size=600),
    "num_target_layers is 30, but the target": lambda: flat(eagle3(DEFAULT), num_target_layers=30),
    "the draft has 100 of 512 tokens, and no d2t says which": lambda: without(eagle3(DEFAULT), "d2t", "t2d"),
    r"fc\.weight is missing": lambda: without(eagle3(DEFAULT), "fc.weight"),
    "missing weights": lambda: without(eagle3(DEFAULT), "norm.weight"),
    "config.json lacks hidden_size": lambda: flat(eagle3(DEFAULT), hidden_size=GONE),
    "Domino corrects its logits with a GRU": lambda: dflash(architectures=["DominoDraftModel"]),
    "config.json lacks conv_kernel_size, conv_group_size, selector_rank, selector_top_k of DFlash 2": lambda: (
        dflash(architectures=["DFlash2DraftModel"])
    ),
    "final_logit_softcapping is set: logits of the draft's own scale": lambda: dflash(
        architectures=["DFlash2DraftModel"],
        dflash_config=DFLASH | SELECTS | {"final_logit_softcapping": 30.0},
    ),
    "its attention has sinks": lambda: with_weight(dflash(), "layers.0.self_attn.attention_sink_bias", 4),
    "an embedding of its own for the mask": lambda: with_weight(dflash(), "mask_embedding", 64),
    "names no mask_token_id": lambda: dflash(dflash_config={"target_layer_ids": [1, 3, 4]}),
    "block_size is 1: nothing would be drafted": lambda: dflash(block_size=1),
    "and no sliding_window is named": lambda: dflash(
        layer_types=["sliding_attention", "full_attention"], is_causal=True
    ),
    "layers of Gemma 4's shape": lambda: dflash(architectures=["Gemma4DSparkModel"]),
    r"unknown draft architecture \['Unheard'\]": lambda: flat(
        Draft(dict(SIZES), {"x": torch.zeros(1)}, [], 1), architectures=["Unheard"]
    ),
    r"next-token modules of a target \(MTP\) under names that are not known": lambda: Draft(
        {"architectures": ["Qwen3NextMTP"]}, {"mtp.fc.weight": torch.zeros(1)}, [], 1
    ),
    "EAGLE-1 and 2 read the last state alone": lambda: Draft(
        {"architectures": ["LlamaForCausalLM"]},
        {"fc.weight": torch.zeros(1), "layers.0.x": torch.zeros(1)},
        [],
        1,
    ),
    "no weight of a residual head": lambda: Draft(
        {"medusa_num_heads": 2}, {"lm_head.weight": torch.zeros(1)}, [], 1
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_draft_that_is_not_run_is_refused_with_its_true_reason(message, target, tmp_path):
    REFUSED[message]().write(tmp_path)
    with pytest.raises(DeepSpecError, match=message) as caught:
        load_drafter(tmp_path, target)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_would_run_code_is_not_read(target, tmp_path):
    draft = eagle3(DEFAULT)
    draft.write(tmp_path, "bin")
    torch.save({"fc.weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeepSpecError, match="holds more than weights, and is not run"):
        load_drafter(tmp_path, target)


def test_files_that_are_not_there_are_named(target, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(eagle3(DEFAULT).config))
    with pytest.raises(DeepSpecError, match=r"no weights \(model.safetensors, pytorch_model.bin"):
        load_drafter(tmp_path, target)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"fc.weight": "a.safetensors"}})
    )
    with pytest.raises(DeepSpecError, match=r"names a\.safetensors, which is not there"):
        load_drafter(tmp_path, target)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DeepSpecError, match="not an index of shards"):
        load_drafter(tmp_path, target)


def test_d2t_is_read_as_the_mask_of_tokens_says():
    ids = torch.tensor([3, 4, 9])
    offsets = ids - torch.arange(3)
    mask = torch.zeros(20, dtype=torch.bool).index_fill_(0, ids, True)
    for given in (ids, offsets):
        assert draft_ids(given, mask, 3, 20).tolist() == ids.tolist()
    assert draft_ids(offsets, None, 3, 20).tolist() == ids.tolist()  # 3, 3, 7: no ids, and no need of a mask
    assert draft_ids(torch.tensor([3, 9, 15]), None, 3, 20).tolist() == [3, 9, 15]
    assert draft_ids(None, None, 20, 20).tolist() == list(range(20))
    for given, known, message in (
        (torch.tensor([30, 30, 30]), None, "out of the vocabulary or twice to one token"),
        (offsets, ~mask, "t2d does not mark the tokens"),
        (offsets[:2], None, r"d2t is \[2\], expected \[3\]"),
    ):
        with pytest.raises(DeepSpecError, match=message):
            draft_ids(given, known, 3, 20)


def test_what_only_the_target_can_say_is_named_without_one(tmp_path):
    plan = examine(eagle3(DEFAULT).write(tmp_path))
    assert plan.refusal is None and plan.kind == "eagle3"
    assert plan.needs_target == ("layer ids, which its config.json does not say",)
    assert any("1, L/2 - 1 and L - 4" in said for said in plan.assumed)
    assert any("rope_theta 10000" in said for said in plan.assumed)


def test_a_target_with_next_token_modules_is_a_model_all_the_same(directory, tmp_path):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file({"mtp.fc.weight": torch.zeros(1)}, tmp_path / "extra.safetensors")
    names = {"mtp.fc.weight": "extra.safetensors"}
    names |= dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plan = examine(tmp_path, LAYERS)
    assert plan.kind == "lm" and any("next-token modules (MTP, 1 weights)" in said for said in plan.assumed)


@pytest.fixture
def inspected(directory):
    def run(path, with_target: bool = False):
        flags = ["--target", str(directory)] if with_target else []
        found = CliRunner().invoke(app, ["inspect", str(path), *flags])
        return found.exit_code, " ".join(found.output.split())

    return run


def test_inspect_says_what_a_directory_is_and_what_it_lacks(inspected, tmp_path):
    draft = flat(eagle3(DEFAULT), architectures=["LlamaForCausalLM"])
    code, output = inspected(draft.write(tmp_path / "safeailab"))
    assert code == 0
    for said in (
        "EAGLE-3",
        "SafeAILab",
        "not said",
        "100 of 512 tokens",
        "embed_tokens.weight",
        "layer ids, which its config.json does not say",
        "rope_theta 10000, which config.json does not say",
    ):
        assert said in output
    _, output = inspected(
        STYLES["RedHat's DFlash, reduced vocabulary, windows both ways"]().write(tmp_path / "redhat")
    )
    for said in (
        "DFlash, 2 layers",
        "speculators",
        "someone/target",
        "target layers 1, 3, 4",
        "3 tokens at most",
    ):
        assert said in output


def test_inspect_with_a_target_reads_every_weight(inspected, tmp_path):
    draft = without(eagle3(DEFAULT), "midlayer.mlp.up_proj.weight")
    assert inspected(draft.write(tmp_path))[0] == 0
    code, output = inspected(tmp_path, with_target=True)
    assert code == 1 and "no: missing weights ['midlayer.mlp.up_proj.weight']" in output
    assert "target layers 1, 3, 4" in output  # what the target said
    eagle3(DEFAULT).write(tmp_path)
    code, output = inspected(tmp_path, with_target=True)
    assert code == 0 and "every weight is accounted for" in output


def test_inspect_gives_the_reason_of_a_draft_that_is_not_run(inspected, tmp_path):
    code, output = inspected(eagle3(DEFAULT, parallel=True).write(tmp_path))
    assert code == 1 and "names no mask token" in output
    assert inspected(tmp_path / "nothing")[0] != 0


@pytest.mark.parametrize(
    ("kind", "engine"), [("eagle3", "vllm"), ("eagle3", "sglang"), ("eagle3", "speculators")]
)
def test_our_exports_of_eagle3_load_back(kind, engine, target, tmp_path):
    check_round_trip(kind, engine, target, tmp_path)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("dflash", "vllm"),
        ("dflash", "sglang"),
        ("dflash", "speculators"),
        ("dspark", "vllm"),
        ("dspark", "speculators"),
        ("medusa", "vllm"),
    ],
)
def test_our_other_exports_load_back(kind, engine, target, tmp_path):
    check_round_trip(kind, engine, target, tmp_path)


@pytest.mark.parametrize(
    ("kind", "engine", "sizes"),
    [
        ("eagle3", "vllm", {"version": "3.1"}),
        ("eagle3", "speculators", {"version": "3.1"}),
        ("peagle", "vllm", {}),
        ("peagle", "hf", {"sliding_window": 6}),
        ("dflash", "vllm", {"causal": True, "sliding_window": 6}),
        ("dflash2", "hf", {"causal": True, "draft_vocab_size": 100}),
    ],
)
def test_our_variants_load_back(kind, engine, sizes, target, tmp_path):
    check_round_trip(kind, engine, target, tmp_path, **sizes)


@torch.no_grad()
def check_round_trip(kind, engine, target, tmp_path, **sizes) -> None:
    """An export is a draft directory like any other: it drafts what the draft does that it was made from."""
    draft = make_draft(tmp_path, target, kind, **sizes)
    _, path = written(draft, engine, tmp_path / "exports")
    laws = []
    for drafter in (load_drafter(draft.directory, target), load_drafter(path, target)):
        session = drafter.session(1)
        session.begin(0)
        rng = torch.Generator().manual_seed(0)
        features = torch.randn(ANCHOR, len(drafter.layers) * D, generator=rng)
        session.extend(0, TEXT[:ANCHOR], features)
        (proposal,) = session.propose([DraftRequest(0, TEXT[ANCHOR], Sampling(1.0), rng, 9, Chain())])
        laws.append(torch.stack([proposal.law(k) for k in range(3)]))
    ours, again = laws
    if engine == "sglang" and kind == "dflash":  # widened to the whole vocabulary, its law otherwise the same
        again = again * (ours > 0)
        again /= again.sum(-1, keepdim=True)
    # These two take the target's own head, which is not rounded to the draft's bfloat16.
    rounded = (kind, engine) in {("dflash", "sglang"), ("medusa", "vllm")}
    torch.testing.assert_close(
        again[:1], ours[:1], atol=1e-3 if rounded else 1e-5, rtol=2e-2 if rounded else 1e-4
    )
