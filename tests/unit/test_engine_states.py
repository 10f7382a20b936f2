"""States that an engine wrote train as those computed here, and misaligned ones are refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.errors import DeepSpecError
from deepspec.features.codec import codec
from deepspec.features.extract import Extractor
from deepspec.features.inside.deepspec_codec import packed
from deepspec.features.local import CachedFeatures
from deepspec.features.proof import TOKENS, computed_states
from deepspec.features.sequences import Sequences
from deepspec.features.states import EngineStates, engine_layers, file_name
from deepspec.target.ends import H_LAST, load_ends
from tests.engine_files import engine_states, write_states
from tests.tiny import cached_target
from tests.unit.test_ends import whole, write_family

LAYERS = (0, 2, H_LAST)


@pytest.fixture(scope="module")
def ends():
    return load_ends(cached_target("llama"))


@pytest.fixture
def folder(target, sequences, ends, tmp_path):
    """What an engine writes of the first six sequences: the state before each layer asked for, and the last one."""
    asked = engine_layers(LAYERS, ends.num_layers)
    assert asked == [0, 1, 3, 4]
    for sequence in sequences[:6]:
        write_states(tmp_path / file_name(sequence.ids), target, sequence.ids, asked)
    return tmp_path


@pytest.fixture
def states(folder, sequences, ends):
    return EngineStates(folder, ends, Sequences.of(sequences[:6]), LAYERS)


def test_an_engines_states_are_those_computed_here(states, target, sequences):
    computed = Extractor(target, Sequences.of(sequences[:6]), LAYERS).rows([0, 4])
    for ours, theirs in zip(states.rows([0, 4]), computed, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_they_become_a_cache_of_their_own_kind(states, folder, target, ends, sequences, tmp_path):
    mine = CachedFeatures(tmp_path / "cache", ends, sequences[:6], LAYERS, "data", computed_by="engine")
    mine.build(lambda: states)
    local = CachedFeatures(tmp_path / "local", target, sequences[:6], LAYERS, "data")
    local.build()
    torch.testing.assert_close(mine.batch([1, 3])[0], local.batch([1, 3])[0], rtol=0.02, atol=0.02)
    assert mine.describe()["computed_by"] == "engine" and "computed_by" not in local.describe()
    with pytest.raises(DeepSpecError, match=r"features of another computed_by \(None, wanted engine\)"):
        CachedFeatures(tmp_path / "local", ends, sequences[:6], LAYERS, "data", computed_by="engine").build()


FORMS = ("fp8", "int8", "int4")


def encoded(tmp_path, target, ends, sequences, form):
    """Six sequences as an engine writes them in a form."""
    folder = tmp_path / form
    folder.mkdir()
    for sequence in sequences[:6]:
        ids = sequence.ids
        write_states(folder / file_name(ids), target, ids, engine_layers(LAYERS, ends.num_layers), form=form)
    return EngineStates(folder, ends, Sequences.of(sequences[:6]), LAYERS, form)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_engine_encodes_is_to_the_byte_what_is_encoded_here(
    states, folder, target, ends, sequences, form, tmp_path
):
    there = encoded(tmp_path, target, ends, sequences, form)
    there.check_layers()
    for ours, theirs in zip(there.rows([0, 4]), states.rows([0, 4]), strict=True):
        assert torch.equal(ours[H_LAST], theirs[H_LAST])
        for layer in (0, 2):
            for part, x in codec(form).encode(theirs[layer]).items():
                assert torch.equal(ours[layer][part].view(torch.uint8), x.view(torch.uint8)), part
    caches = []
    for name, source in (("there", there), ("here", states)):
        cache = CachedFeatures(tmp_path / name, ends, sequences[:6], LAYERS, "data", form, "engine")
        cache.build(lambda source=source: source)
        caches.append(cache)
    assert caches[0].manifest == caches[1].manifest  # checksums of the shards among it
    name = file_name(sequences[0].ids)
    sizes = [(place / name).stat().st_size for place in (tmp_path / form, folder)]
    assert sizes[0] < sizes[1]


def test_states_in_another_form_than_is_asked_for_are_refused(target, ends, sequences, tmp_path):
    there = encoded(tmp_path, target, ends, sequences, "fp8")
    asked = EngineStates(there.folder, ends, there.sequences, LAYERS)
    with pytest.raises(DeepSpecError, match=r"states in fp8, and train\.features\.form is bf16"):
        asked.rows([0])


def test_a_middle_layer_that_is_off_is_found_in_codes_too(target, ends, sequences, tmp_path):
    there = encoded(tmp_path, target, ends, sequences, "fp8")
    path, ids = there.folder / file_name(sequences[0].ids), sequences[0].ids
    kept = packed(engine_states(target, ids, [0, 1, 2, 4]), "fp8") | {"token_ids": torch.tensor(ids)}
    save_file(kept, path, {"layer_ids": "[0, 1, 3, 4]", "form": "fp8"})
    with pytest.raises(DeepSpecError, match=r"under its layer id 3 are those of id 2 \(-1\)"):
        there.check_layers()


def shifted(kept, sequences):
    kept["hidden_states"] = kept["hidden_states"].roll(1, 0)
    kept["hidden_states"][0] = kept["hidden_states"][1]


def shifted_back(kept, sequences):
    kept["hidden_states"] = kept["hidden_states"].roll(-1, 0)


def of_another_request(kept, sequences):
    kept["token_ids"] = torch.tensor(sequences[5].ids)


def of_another_text_under_these_ids(kept, sequences):
    kept["hidden_states"] = kept["hidden_states"].flip(0)


def one_layer_on(kept, sequences):
    kept["hidden_states"] = kept["hidden_states"][:, [1, 2, 3, 3]]


def a_layer_less(kept, sequences):
    kept["hidden_states"] = kept["hidden_states"][:, :3]


def cut_short(kept, sequences):
    kept["hidden_states"] = kept["hidden_states"][:-1]


def not_finite(kept, sequences):
    kept["hidden_states"][3, -1] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shifted, "its states are shifted: each is that of the token before it"),
        (shifted_back, "its states are shifted: each is that of the token after it"),
        (of_another_request, "states of other tokens: "),
        (of_another_text_under_these_ids, "not the embedding of its tokens"),
        (one_layer_on, "not the embedding of its tokens: layer ids that are off by one"),
        (a_layer_less, "was asked for"),
        (cut_short, "was asked for"),
        (not_finite, "the logits of its last states are not finite"),
    ],
)
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_states_of_something_else_are_refused(folder, ends, sequences, change, said, form):
    states = EngineStates(folder, ends, Sequences.of(sequences[:6]), LAYERS, form)
    path = folder / file_name(sequences[2].ids)
    kept = load_file(path)
    change(kept, sequences)
    parts = packed(kept["hidden_states"], form) | {"token_ids": kept["token_ids"]}
    save_file({name: x.contiguous() for name, x in parts.items()}, path, {"form": form})
    states.rows([1])
    with pytest.raises(DeepSpecError) as error:
        states.rows([2])
    assert said in str(error.value) and path.name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_says_which_layers_it_has_is_believed_no_more_than_the_request(
    states, folder, target, sequences
):
    path = folder / file_name(sequences[2].ids)
    write_states(path, target, sequences[2].ids, [0, 1, 3, 4], named=True)
    states.rows([2])
    write_states(path, target, sequences[2].ids, [0, 1, 2, 4], named=True)
    with pytest.raises(
        DeepSpecError, match=r"states of the engine's layers \[0, 1, 2, 4\], and \[0, 1, 3, 4\]"
    ):
        states.rows([2])


def test_layers_are_proven_by_those_that_are_computed_here(states, folder, target, sequences):
    states.check_layers()
    path, ids = folder / file_name(sequences[0].ids), sequences[0].ids
    write_states(path, target, ids, [0, 1, 2, 4])  # a middle layer alone is off
    states.rows([0])
    with pytest.raises(DeepSpecError, match=r"under its layer id 3 are those of id 2 \(-1\)") as error:
        states.check_layers()
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_states_of_another_model_are_far_from_all_layers(states, folder, target, sequences):
    path, ids = folder / file_name(sequences[0].ids), sequences[0].ids
    kept = engine_states(target, ids, [0, 1, 3, 4])
    kept[:, 2] = 3 * torch.randn(kept[:, 2].shape, generator=torch.Generator().manual_seed(0))
    save_file({"hidden_states": kept, "token_ids": torch.tensor(ids)}, path)
    with pytest.raises(DeepSpecError, match="layer id 3 are "):
        states.check_layers()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt2"])
def test_the_layers_of_other_families_are_computed_one_at_a_time(family, tmp_path):
    directory = write_family(tmp_path / family, family)
    target, ids = whole(directory), list(range(3, 40))
    computed = computed_states(directory, ids, target.num_layers)
    expected = engine_states(target, ids[:TOKENS], list(range(target.num_layers + 1)))
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_cannot_be_run_here_is_not_proven_and_said_so(tmp_path, caplog):
    assert computed_states(tmp_path, [1, 2], 4) is None
    assert "layers not proven" in caplog.text


def test_a_broken_file_is_named(states, folder, sequences):
    (folder / file_name(sequences[0].ids)).write_bytes(b"half a file")
    with pytest.raises(DeepSpecError, match="not a file of an engine's states"):
        states.rows([0])


def test_what_is_missing_is_written_down_to_be_asked_for(folder, sequences, ends, tmp_path):
    states = EngineStates(folder, ends, Sequences.of(sequences[:8]), LAYERS)
    requests = tmp_path / "requests.jsonl"
    with pytest.raises(
        DeepSpecError, match=r"no states of 2 of 8 conversations; .*requests\.jsonl says what to ask"
    ):
        states.check_complete(requests)
    asked = [json.loads(line) for line in requests.read_text().splitlines()]
    assert [request["token_ids"] for request in asked] == [sequences[i].ids for i in (6, 7)]
    assert asked[0] == {
        "token_ids": sequences[6].ids,
        "layer_ids": [0, 1, 3, 4],
        "file": file_name(sequences[6].ids),
    }
    EngineStates(folder, ends, Sequences.of(sequences[:6]), LAYERS).check_complete(requests)
