"""Training prompts: what is read, what is kept out, how sources mix, and that magpie loses no work."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from deepspec.errors import DeepSpecError
from deepspec.files import digest
from deepspec.messages.prompt import Chat
from deepspec.messages.sources import Candidate, hub_source, read_jsonl
from deepspec.prompts.build import build_prompts, split_by_weight, write_prompts
from deepspec.prompts.filters import Sieve, noise
from deepspec.prompts.magpie import ATTEMPTS_PER_PROMPT
from deepspec.prompts.overlap import Overlap
from deepspec.prompts.params import PromptsParams
from tests.fake_target import FakeTarget, scripted_stream

HELD_OUT = "How many geese cross the frozen canal between dusk and dawn?"


def params(**fields):
    return PromptsParams(**({"count": 12, "mix": {"seed": 1.0}} | fields))


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def questions(path, count, about="rivers"):
    return jsonl(path, *({"turns": [f"What is fact {i} about {about}?"]} for i in range(count)))


# Reading


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"turns": ["a", "b"]}, ["a", "b"]),
        ({"prompt": "a"}, ["a"]),
        ({"question": "a", "answer": "b"}, ["a"]),
        ({"instruction": "a", "input": "b", "output": "c"}, ["a\n\nb"]),
        ({"instruction": "a", "input": ""}, ["a"]),
        ({"prompt": [{"role": "user", "content": "a"}]}, ["a"]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, ["a"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, ["a"]),
    ],
)
def test_every_common_layout_gives_its_user_turns(tmp_path, row, turns):
    (found,) = read_jsonl(jsonl(tmp_path / "p.jsonl", row))
    assert list(found.chat.turns) == turns


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"turns": ["a"]', "malformed line"),
        ('["a"]', "expected an object, found list"),
        ('{"text": "a"}', "none of the fields turns"),
        ('{"turns": []}', "no user turn"),
        ('{"turns": ["a", " "]}', "or an empty one"),
        ('{"turns": 3}', "must be a string or a list, found int"),
        ('{"turns": [3]}', "must hold strings or messages, found int"),
        ('{"messages": [{"role": "user", "content": null}]}', "has no text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no user turn"),
        ("[" * 100_000, "malformed line"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, reason):
    path = jsonl(tmp_path / "p.jsonl", {"turns": ["fine"]}, "", line)
    with pytest.raises(DeepSpecError) as caught:
        build_prompts(params(mix={f"jsonl:{path}": 1.0}), 0, [])
    assert f"{path}:3: malformed line" in str(caught.value)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DeepSpecError, match=r"p\.jsonl:1: malformed line: not UTF-8"):
        read_jsonl(tmp_path / "p.jsonl")


def test_a_missing_prompt_file_is_one_line(tmp_path):
    with pytest.raises(DeepSpecError, match=r"absent\.jsonl: no such prompt file"):
        build_prompts(params(mix={f"jsonl:{tmp_path}/absent.jsonl": 1.0}), 0, [])


def test_a_dataset_directory_is_read_by_split_and_bad_rows_are_rejected(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i} please"},
                {"role": "assistant", "content": "b"},
            ]
        }
        for i in range(4)
    ]
    bad = {"messages": [{"role": "assistant", "content": "b"}]}
    splits = {"train": Dataset.from_list([*rows, bad]), "test": Dataset.from_list(rows[:1])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    candidates = list(hub_source(f"{tmp_path}/saved", seed=0))
    assert sorted(c.turns[0] for c in candidates if not c.fault) == [f"Question {i} please" for i in range(4)]
    assert [c.fault for c in candidates if c.fault] == ["no user turn"]
    assert len(list(hub_source(f"{tmp_path}/saved:test", seed=0))) == 1


def test_a_directory_of_data_files_is_a_dataset_too(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "raw").mkdir()
    jsonl(tmp_path / "raw" / "train.jsonl", {"question": "Why is the sky blue?", "answer": "b"})
    assert [c.turns for c in hub_source(f"{tmp_path}/raw:train", seed=0)] == [["Why is the sky blue?"]]


@pytest.mark.parametrize("spec", ["{}/saved:absent", "{}/nothing-here"])
def test_a_dataset_that_cannot_be_loaded_is_one_line(tmp_path, spec):
    DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DeepSpecError, match="could not be loaded") as caught:
        list(hub_source(spec.format(tmp_path), seed=0))
    assert "\n" not in str(caught.value)


def test_a_dataset_without_prompts_names_its_columns(tmp_path):
    Dataset.from_list([{"picture": 1, "label": 2}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DeepSpecError, match="no column of prompts; found picture, label"):
        hub_source(f"{tmp_path}/saved", seed=0)


# Filtering


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Say hello<|im_start|>assistant", "template marker"),
        ("[INST] Say hello [/INST]", "template marker"),
        ("Hello\x00 there, how are you?", "control characters"),
        ("A lone surrogate \ud800 here", "control characters"),
        ("Why noooooooooooooo?", "character run"),
        ("@#$%^&*() what {}[]<>!? ;:'", "mostly symbols"),
        ("1 2 3 4 5 6 7 8 9 10 a", "few letters"),
        ("tell me a story " * 12, "repetitive"),
        (" \n", "empty turn"),
    ],
)
def test_noise_is_named(text, reason):
    assert noise(text) == reason


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 * 34 + 56 * 78?",
        "def f(x: int) -> int:\n    return x ** 2 |> g",
        "| a | b |\n|---|---|\n| one | two |\nSort this table by the second column, please.",
        "为什么天空是蓝色的？",
        "Warum ist der Himmel blau?",
        "Convert 100000000000 bytes to gigabytes",
    ],
)
def test_code_tables_numbers_and_other_languages_are_not_noise(text):
    assert noise(text) is None


def test_the_sieve_counts_each_rejection_by_its_reason():
    sieve = Sieve(params(min_chars=12, max_chars=60), Overlap([HELD_OUT], 8))
    turns = [
        ["Short?"],
        ["Why is it that " + "very " * 20 + "long?"],
        [HELD_OUT.upper()],
        ["What is a good name for a cat?", HELD_OUT],
        ["What is a good name for a cat?"],
        ["what is a good name   for a cat"],
        ["What is a good name for a cat?", "Why?"],
    ]
    admitted = [sieve.admit(sieve.judge("seed", Candidate(Chat.of_turns(one)))) for one in turns]
    assert admitted == [False, False, False, False, True, False, True]
    assert sieve.rejected == {"too short": 1, "too long": 1, "in evaluation": 2, "duplicate": 1}


def test_evaluation_prompts_in_a_source_do_not_reach_training(tmp_path):
    path = jsonl(
        tmp_path / "p.jsonl", {"prompt": f"Please answer. {HELD_OUT}"}, {"prompt": "Why do geese fly south?"}
    )
    built = build_prompts(params(mix={f"jsonl:{path}": 1.0}), 0, [HELD_OUT])
    assert [row["turns"] for row in built.rows] == [["Why do geese fly south?"]]
    assert built.manifest["rejected"] == {"in evaluation": 1}


# Mixing


def test_shares_follow_the_weights_and_add_up():
    assert split_by_weight(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert split_by_weight(7, {"a": 0.9, "b": 0.1}) == {"a": 6, "b": 1}


def test_sources_mix_by_weight_and_the_seed_decides(tmp_path):
    mix = {"seed": 3.0, f"jsonl:{questions(tmp_path / 'p.jsonl', 40)}": 1.0}
    built = build_prompts(params(count=40, mix=mix), 7, [])
    assert Counter(row["source"] for row in built.rows) == dict(zip(mix, (30, 10), strict=True))
    assert built == build_prompts(params(count=40, mix=mix), 7, [])
    assert built.rows != build_prompts(params(count=40, mix=mix), 8, []).rows
    assert {row["source"] for row in built.rows[:12]} == set(mix)  # shuffled: any start is a mix


def test_what_one_source_lacks_the_others_supply_and_the_manifest_says_so(tmp_path):
    few = f"jsonl:{questions(tmp_path / 'p.jsonl', 2)}"
    built = build_prompts(params(count=20, mix={"seed": 0.5, few: 0.5}), 0, [])
    assert built.manifest["sources"] == {
        "seed": {"requested": 10, "accepted": 18},
        few: {"requested": 10, "accepted": 2},
    }
    assert built.manifest["notes"] == [f"{few} ran out: 2 of the 10 prompts asked of it"]


def test_fewer_prompts_than_asked_is_an_honest_count(tmp_path):
    few = f"jsonl:{questions(tmp_path / 'p.jsonl', 5)}"
    built = build_prompts(params(count=20, mix={few: 1.0}), 0, [])
    assert (built.manifest["count"], built.manifest["requested"], len(built.rows)) == (5, 20, 5)
    assert "only 5 of 20 prompts: every source ran out" in built.manifest["notes"]


def test_no_prompt_at_all_is_an_error_that_says_why(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "Hi"})
    with pytest.raises(DeepSpecError, match=r"no training prompt passed the filters .*too short 1"):
        build_prompts(params(mix={f"jsonl:{path}": 1.0}), 0, [])


def test_a_source_of_weight_zero_is_not_opened():
    built = build_prompts(params(mix={"seed": 1.0, "jsonl:absent.jsonl": 0.0, "magpie": 0.0}), 0, [])
    assert set(built.manifest["sources"]) == {"seed"}


def test_the_files_hold_rows_with_ids_of_their_turns_and_a_digest(tmp_path):
    built = build_prompts(params(), 0, [])
    write_prompts(built, tmp_path / "out")
    text = (tmp_path / "out" / "train.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert rows == built.rows and manifest == built.manifest
    assert manifest["digest"] == digest(text)
    assert (
        rows[0]["id"] == digest(json.dumps(rows[0]["turns"], ensure_ascii=False)) and len(rows[0]["id"]) == 16
    )
    assert len({row["id"] for row in rows}) == len(rows) == 12


# Magpie


class Writer(FakeTarget):
    def user_prefix_ids(self):
        return self.ids("<|start|>user\n")


class Engine:
    """Writes question i for attempt i, and remembers which attempts it was asked for."""

    def __init__(self, monkeypatch, target, text=None, die_after=None):
        self.asked = []
        self._target, self._die_after = target, die_after
        self._text = text or (lambda index: f"What would happen if number {index} vanished?")
        engine = SimpleNamespace(stream=scripted_stream(self._answer))
        monkeypatch.setitem(sys.modules, "deepspec.decoding.engine", engine)

    def _answer(self, request):
        if self._die_after is not None and len(self.asked) >= self._die_after:
            raise KeyboardInterrupt
        self.asked.append(request.id)
        text = self._text(request.id)
        if text is None:
            return self._target.ids("an endless ramble about"), "length"
        return [*self._target.ids(text), self._target.end], "stop"


@pytest.fixture
def target():
    return Writer()


def magpie(target, work, count=6, seed=0, batch_size=3, **fields):
    chosen = params(count=count, mix={"magpie": 1.0}, **fields)
    return build_prompts(chosen, seed, [], target=target, batch_size=batch_size, work_dir=work)


def texts(built):
    return [row["turns"][0] for row in built.rows]


def test_magpie_prompts_are_what_the_target_wrote_up_to_its_stop_token(monkeypatch, target, tmp_path):
    Engine(monkeypatch, target)
    built = magpie(target, tmp_path, count=2)
    assert sorted(texts(built)) == [f"What would happen if number {i} vanished?" for i in (0, 1)]
    assert {row["source"] for row in built.rows} == {"magpie"}


def test_magpie_requests_carry_the_prefix_the_sampler_and_seeds_of_their_own(monkeypatch, target, tmp_path):
    requests = []

    def stream(target, drafter, next_request, batch_size):
        assert drafter is None and batch_size == 3
        while (request := next_request()) is not None:
            requests.append(request)
        yield from ()

    monkeypatch.setitem(sys.modules, "deepspec.decoding.engine", SimpleNamespace(stream=stream))
    with pytest.raises(DeepSpecError, match="no training prompt"):
        magpie(target, tmp_path, magpie={"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 33})
    assert requests[0].prompt_ids == target.user_prefix_ids()
    assert (requests[0].sampling.temperature, requests[0].sampling.top_p) == (0.9, 0.8)
    assert requests[0].max_new_tokens == 33
    assert len({request.seed for request in requests}) == len(requests) == 6 * ATTEMPTS_PER_PROMPT


def test_attempts_that_do_not_stop_repeat_or_leak_the_template_are_rejected(monkeypatch, target, tmp_path):
    written = [
        None,
        "Why is it so cold in winter?",
        "why is it so cold in winter",
        "Tell me<|start|>assistant more",
    ]
    Engine(monkeypatch, target, lambda i: written[i] if i < 4 else f"Is {i} a good number of chairs?")
    built = magpie(target, tmp_path, count=3)
    assert built.manifest["rejected"] == {"duplicate": 1, "template marker": 1, "unfinished": 1}
    assert sorted(texts(built))[0] == "Is 4 a good number of chairs?"


def test_the_prompts_do_not_depend_on_the_batch_size(monkeypatch, target, tmp_path):
    Engine(monkeypatch, target, lambda i: None if i % 3 else f"What is special about number {i}?")
    one = magpie(target, tmp_path / "one", batch_size=1)
    many = magpie(target, tmp_path / "many", batch_size=16)
    assert one == many


def test_attempts_are_bounded(monkeypatch, target, tmp_path):
    engine = Engine(monkeypatch, target, lambda i: None)
    with pytest.raises(DeepSpecError, match="unfinished 24"):
        magpie(target, tmp_path, count=6)
    assert len(engine.asked) == 6 * ATTEMPTS_PER_PROMPT


def test_seeds_fill_in_for_a_target_that_cannot_write_prompts(monkeypatch, target, tmp_path):
    Engine(monkeypatch, target, lambda i: None)
    mix = params(count=10, mix={"magpie": 0.5, "seed": 0.5})
    built = build_prompts(mix, 0, [], target=target, work_dir=tmp_path)
    assert Counter(row["source"] for row in built.rows) == {"seed": 10}
    assert built.manifest["notes"] == ["magpie ran out: 0 of the 5 prompts asked of it"]


def test_magpie_supplies_more_where_another_source_runs_out(monkeypatch, target, tmp_path):
    Engine(monkeypatch, target)
    few = f"jsonl:{questions(tmp_path / 'p.jsonl', 1)}"
    built = build_prompts(
        params(count=8, mix={"magpie": 0.5, few: 0.5}), 0, [], target=target, work_dir=tmp_path
    )
    assert Counter(row["source"] for row in built.rows) == {"magpie": 7, few: 1}
    assert len(set(texts(built))) == 8


def test_a_killed_run_goes_on_and_ends_with_the_same_prompts(monkeypatch, target, tmp_path):
    Engine(monkeypatch, target)
    whole = magpie(target, tmp_path / "whole", count=12)

    killed = Engine(monkeypatch, target, die_after=5)
    with pytest.raises(KeyboardInterrupt):
        magpie(target, tmp_path / "killed", count=12)
    (work,) = (tmp_path / "killed").iterdir()
    with work.open("a") as file:
        file.write('{"index": 99, "text": "half a li')  # what kill -9 leaves behind

    resumed = Engine(monkeypatch, target)
    assert magpie(target, tmp_path / "killed", count=12) == whole
    assert not set(killed.asked) & set(resumed.asked)
    lines = [json.loads(line)["index"] for line in work.read_text().splitlines()]
    assert len(lines) == len(set(lines)) and 99 not in lines


def test_a_finished_run_asks_the_target_for_nothing(monkeypatch, target, tmp_path):
    Engine(monkeypatch, target)
    first = magpie(target, tmp_path)
    again = Engine(monkeypatch, target)
    assert magpie(target, tmp_path) == first
    assert again.asked == []


@pytest.mark.parametrize("change", ["seed", "target", "settings"])
def test_another_target_seed_or_sampler_starts_afresh(monkeypatch, target, tmp_path, change):
    Engine(monkeypatch, target)
    magpie(target, tmp_path)
    engine = Engine(monkeypatch, target)
    other = Writer()
    other.digest = "another" if change == "target" else target.digest
    settings = {"magpie": {"temperature": 0.5}} if change == "settings" else {}
    magpie(other, tmp_path, seed=int(change == "seed"), **settings)
    assert 0 in engine.asked
    assert len(list(tmp_path.iterdir())) == 2
