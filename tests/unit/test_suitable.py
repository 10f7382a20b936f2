"""What a target can be used for is said at the door, in the words that its drafts' exports would be refused with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from deepspec.commands import doctor
from deepspec.drafters.registry import algorithms
from deepspec.drafters.suitable import intended
from deepspec.export.engines import ENGINES, plan
from deepspec.export.suitable import CHECKS, Refused, in_words, refusals
from deepspec.target.model import load_target
from tests.exporting import LAYERS, SIZES, make_draft
from tests.tiny import cached_target

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "eagle3": {},
    "eagle3 with norms": {"qk_norm": True},
    "eagle3 of two layers": {"target_layer_ids": [1, 3]},
    "dspark": {},
    "dspark with a gated head": {"markov_head": "gated"},
    "dspark of shuffled layers": {"target_layer_ids": [3, 1]},
    "dflash": {},
    "dflash from masks": {"sample_from_anchor": False},
    "dflash that is causal": {"causal": True},
    "dspark within a window": {"sliding_window": 9},
    "dflash2": {},
    "dflash2 of a few tokens": {"draft_vocab_size": 64},
    "dflash with a head of low rank": {"draft_vocab_size": 0, "head_rank": 8, "sample_from_anchor": False},
    "dspark with a head of low rank": {"draft_vocab_size": 0, "head_rank": 8},
    "peagle": {},
    "peagle within a window": {"sliding_window": 9},
    "eagle3 3.1": {"version": "3.1"},
    "mtp": {},
    "medusa": {},
    "lm": {},
    "lookup": {},
    "suffix": {},
}


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target(layers=LAYERS))


def section(name: str):
    kind = name.split()[0]
    return algorithms()[kind].params(type=kind, **SIZES[kind] | VARIANTS[name])


def test_every_engine_is_asked_about_every_kind_that_it_takes():
    assert {engine: set(plans) for engine, plans in ENGINES.items()} == {
        engine: set(kinds) for engine, kinds in CHECKS.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_the_door_and_the_export_refuse_alike(name, target, tmp_path):
    networks, refused = intended(target, {name: section(name)})
    assert not refused
    found = refusals(target, networks)[name]
    draft = make_draft(tmp_path, target, name.split()[0], **VARIANTS[name])
    for engine in ENGINES:
        try:
            plan(draft, engine, "there", 3)
            said = None
        except Refused as refusal:
            said = str(refusal)
        assert found[engine] == said
    assert "\n" not in in_words(found)


def test_the_words_name_who_can_and_why_others_cannot(target):
    networks, _ = intended(target, {"mine": section("eagle3 of two layers")})
    assert in_words(refusals(target, networks)["mine"]) == (
        "hf, vllm, speculators; not sglang: SGLang and llama.cpp size EAGLE-3 for three target layers, not 2; train "
        "with three; not tgi: TGI knows Medusa and n-gram drafts, not eagle3; train medusa; "
        "not llamacpp: SGLang and llama.cpp size EAGLE-3 for three target layers, not 2; train with three"
    )


def test_the_doctor_says_it_of_every_drafter(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    found = {c.name: c for c in doctor.examine_as_target(str(cached_target(layers=LAYERS)), tmp_path)}
    assert found["decoding"].ok and found["trees"].found == "verified"
    made = [name.removeprefix("drafter ") for name in found if name.startswith("drafter ") and found[name].ok]
    assert len(made) > 3
    for name in made:
        assert re.match(r"(hf|vllm|none)", found[f"export of {name}"].found)
