"""Generation: what is written, that a kill loses and repeats nothing, and what goes wrong in one line."""

import errno
import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
from datasets import Dataset

from deepspec.answers import generate, shards
from deepspec.answers.conversation import Conversation
from deepspec.answers.generate import generate_data, longest_first
from deepspec.answers.params import GenerateParams
from deepspec.answers.shards import FEATURES, Shard, Sink, conversation_seed, read_work
from deepspec.entry import guarded
from deepspec.errors import DeepSpecError
from deepspec.messages.prompt import Prompt
from deepspec.messages.prompts import read_prompts
from deepspec.progress import Progress
from tests.fake_target import FakeTarget, scripted_stream

PROMPTS = [
    {"id": f"p{i}", "source": "seed", "turns": ["question " + "x" * i, "and then?"][: 1 + i % 2]}
    for i in range(12)
]


@pytest.fixture
def target():
    return FakeTarget()


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def params(**settings):
    return SimpleNamespace(seed=7, generate=GenerateParams(batch_size=4, max_new_tokens=32, **settings))


def echo(target):
    """Every answer spells its request's seed, so that rows show whether seeds depend on the order."""
    return lambda request: ([*target.ids(f"seed {request.seed}"), target.end], "stop")


def noting(asked, answer):
    """The same answers; the ids of the requests are appended to `asked`."""

    def note_and_answer(request):
        asked.append(request.id)
        return answer(request)

    return note_and_answer


def run(monkeypatch, tmp_path, target, prompts, answer=None, **settings):
    monkeypatch.setattr(generate, "stream", scripted_stream(answer or echo(target)))
    return generate_data(target, params(**settings), prompts, tmp_path / "distill", tmp_path / "work")


def rows_of(tmp_path):
    return Dataset.from_parquet(
        str(tmp_path / "distill/train.parquet"), cache_dir=str(tmp_path / "cache")
    ).to_list()


def failures_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "distill/failures.jsonl").read_text().splitlines()]


def test_every_prompt_becomes_a_row_in_the_order_of_the_file(monkeypatch, tmp_path, target, prompts):
    manifest = run(monkeypatch, tmp_path, target, prompts, temperature=0.7, top_p=0.9)
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == [prompt["id"] for prompt in PROMPTS]
    assert set(rows[0]) == set(FEATURES)
    assert (rows[0]["target"], rows[0]["engine"], rows[0]["temperature"], rows[0]["top_p"]) == (
        target.digest,
        "local",
        0.7,
        0.9,
    )
    assert [len(row["finish_reasons"]) for row in rows] == [len(prompt["turns"]) for prompt in PROMPTS]
    assert manifest["rows"] == 12 and manifest["failures"] == 0
    assert manifest["answer_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
    assert manifest["total_tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert manifest == json.loads((tmp_path / "distill/manifest.json").read_text())


def test_a_second_turn_continues_the_first_verbatim(monkeypatch, tmp_path, target, prompts):
    run(monkeypatch, tmp_path, target, prompts)
    row = rows_of(tmp_path)[1]
    seed = conversation_seed(7, "p1")
    assert target.text(row["input_ids"]) == (
        f"<|start|>user\nquestion x<|end|>\n<|start|>assistant\nseed {seed}<|end|>\n"
        f"<|start|>user\nand then?<|end|>\n<|start|>assistant\nseed {seed + 1}<|end|>"
    )
    masked = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
    assert target.text(masked) == f"seed {seed}<|end|>seed {seed + 1}<|end|>"
    assert row["seed"] == seed


def test_answers_do_not_depend_on_order_or_company(monkeypatch, tmp_path, target, prompts):
    run(monkeypatch, tmp_path / "a", target, prompts)
    reversed_prompts = write(tmp_path / "reversed.jsonl", PROMPTS[::-1])
    run(monkeypatch, tmp_path / "b", target, reversed_prompts)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")[::-1]


def killed_after(target, count):
    """An engine that dies as a killed process does, in the middle of a line of its shard."""
    answers = []

    def answer(request):
        answers.append(request)
        if len(answers) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        return echo(target)(request)

    return answer


def run_until_killed(tmp_path, target, prompts):
    generate.stream = scripted_stream(killed_after(target, 7))
    generate_data(target, params(), prompts, tmp_path / "distill", tmp_path / "work")


def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(monkeypatch, tmp_path, target, prompts):
    unbroken = run(monkeypatch, tmp_path / "unbroken", target, prompts)
    process = multiprocessing.get_context("fork").Process(
        target=run_until_killed, args=(tmp_path, target, prompts)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (shard,) = (tmp_path / "work").glob("*/shard-0-of-1.jsonl")
    finished = len(shard.read_text().splitlines())
    assert 0 < finished < len(PROMPTS)
    with shard.open("a") as file:
        file.write('{"id": "p11", "row": {"sour')

    asked = []
    resumed = run(monkeypatch, tmp_path, target, prompts, noting(asked, echo(target)))
    assert len(set(asked)) == len(PROMPTS) - finished
    assert resumed == unbroken
    assert rows_of(tmp_path) == rows_of(tmp_path / "unbroken")
    assert all(json.loads(line)["id"] for line in shard.read_text().splitlines())


def test_shards_of_another_number_of_processes_count(monkeypatch, tmp_path, target, prompts):
    unbroken = run(monkeypatch, tmp_path / "unbroken", target, prompts)
    (work,) = (tmp_path / "unbroken/work").iterdir()
    lines = (work / "shard-0-of-1.jsonl").read_bytes().splitlines(keepends=True)
    elsewhere = tmp_path / "work" / work.name
    elsewhere.mkdir(parents=True)
    (elsewhere / "shard-0-of-3.jsonl").write_bytes(b"".join(lines[:4]))
    (elsewhere / "shard-2-of-3.jsonl").write_bytes(b"".join(lines[4:6]) + lines[6][:-10])
    asked = []
    resumed = run(monkeypatch, tmp_path, target, prompts, noting(asked, echo(target)))
    assert len(set(asked)) == len(PROMPTS) - 6
    assert resumed == unbroken


def test_processes_share_the_prompts(monkeypatch, tmp_path, target, prompts):
    """Each of three takes its slice; the main one, which ends last here, puts all shards together."""
    barrier = []
    for rank in (2, 1, 0):
        state = SimpleNamespace(
            process_index=rank,
            num_processes=3,
            is_main_process=rank == 0,
            wait_for_everyone=lambda: barrier.append(1),
        )
        monkeypatch.setattr(generate, "process_state", lambda state=state: state)
        manifest = run(monkeypatch, tmp_path, target, prompts)
        assert (manifest is None) == (rank != 0)
    (work,) = (tmp_path / "work").iterdir()
    assert [len(path.read_text().splitlines()) for path in sorted(work.iterdir())] == [4, 4, 4]
    assert [row["id"] for row in rows_of(tmp_path)] == [prompt["id"] for prompt in PROMPTS]
    assert len(barrier) == 3


def test_other_settings_start_afresh(monkeypatch, tmp_path, target, prompts):
    run(monkeypatch, tmp_path, target, prompts, temperature=0.5)
    run(monkeypatch, tmp_path, target, prompts, temperature=0.6)
    assert len(list((tmp_path / "work").iterdir())) == 2
    assert {row["temperature"] for row in rows_of(tmp_path)} == {0.6}


def test_what_does_not_change_answers_does_not_start_afresh(monkeypatch, tmp_path, target, prompts):
    run(monkeypatch, tmp_path, target, prompts)
    monkeypatch.setattr(generate, "stream", scripted_stream(lambda request: pytest.fail("asked again")))
    again = params()
    again.generate = again.generate.model_copy(update={"batch_size": 9})
    generate_data(target, again, prompts, tmp_path / "distill", tmp_path / "work")
    assert len(list((tmp_path / "work").iterdir())) == 1


def test_failures_are_recorded_with_their_reason_and_tried_again(monkeypatch, tmp_path, target):
    rows = [{"id": "long", "source": "seed", "turns": ["x" * 600]}, *PROMPTS]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    good = echo(target)
    manifest = run(
        monkeypatch, tmp_path, target, prompts, lambda r: ([], "error") if r.id == "p3" else good(r)
    )
    assert manifest["rows"] == 11 and manifest["failures"] == 2
    assert failures_of(tmp_path) == [
        {"id": "long", "reason": "the prompt leaves no room for an answer within 512 tokens"},
        {"id": "p3", "reason": "the logits are not finite"},
    ]
    assert run(monkeypatch, tmp_path, target, prompts)["failures"] == 1
    assert [failure["id"] for failure in failures_of(tmp_path)] == ["long"]


def test_not_one_success_is_an_error_with_the_first_reason(monkeypatch, tmp_path, target, prompts):
    with pytest.raises(
        DeepSpecError, match=r"out of 12 prompts; the first reason: the logits are not finite"
    ):
        run(monkeypatch, tmp_path, target, prompts, lambda request: ([], "error"))
    assert not (tmp_path / "distill").exists()


def test_shards_that_another_machine_kept_to_itself_are_missed(monkeypatch, tmp_path, target, prompts):
    state = SimpleNamespace(
        process_index=0, num_processes=3, is_main_process=True, wait_for_everyone=lambda: None
    )
    monkeypatch.setattr(generate, "process_state", lambda: state)
    with pytest.raises(
        DeepSpecError, match="8 of 12 prompts are in no shard; several machines need a shared"
    ):
        run(monkeypatch, tmp_path, target, prompts)


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "fsync"), (shards.Work, "rows_of")], ids=["shard", "data set"]
)
def test_a_full_disk_is_one_line_and_keeps_what_is_there(
    monkeypatch, tmp_path, target, prompts, capsys, owner, name
):
    """While a shard grows, and while the data set is put together."""
    calls = []
    real = getattr(owner, name)

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert guarded(lambda: run(monkeypatch, tmp_path, target, prompts)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    assert not (tmp_path / "distill").exists()
    assert run(monkeypatch, tmp_path, target, prompts)["rows"] == len(PROMPTS)


def test_prompts_of_like_length_are_neighbours(tmp_path):
    lines = [{"id": str(n), "source": "seed", "turns": ["x" * n]} for n in (3, 9, 1, 5)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    arranged = longest_first(read_prompts(path))
    assert [prompt.id for prompt in arranged] == arranged.ids == ["9", "5", "3", "1"]
    assert [prompt.turns for prompt in arranged[1::2]] == [("xxxxx",), ("x",)]
    assert arranged[:2].get("5") == Prompt.of_turns("5", "seed", ("xxxxx",)) and arranged[:2].get("3") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "prompts.jsonl:2: not valid JSON"),
        ("[1]", "prompts.jsonl:2: expected a JSON object, found list"),
        ('{"id": "", "source": "s", "turns": ["a"]}', "prompts.jsonl:2: 'id' must be a non-empty string"),
        ('{"id": "b", "source": "s", "turns": []}', "prompts.jsonl:2: 'turns' must be a list of non-empty"),
        (r'{"id": "b", "source": "s", "turns": ["\ud800"]}', "prompts.jsonl:2: 'turns' must be"),
        ('{"id": "a", "source": "s", "turns": ["again"]}', "prompts.jsonl:2: the id 'a' was used"),
        ("\udcff", "prompts.jsonl:2: not valid JSON"),
    ],
)
def test_a_malformed_prompt_names_its_line(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    first = '{"id": "a", "source": "s", "turns": ["x"]}\n'
    path.write_bytes(f"{first}{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(DeepSpecError, match=message):
        read_prompts(path)


def test_missing_and_empty_prompt_files_are_one_clear_line(tmp_path):
    with pytest.raises(DeepSpecError, match=r"none\.jsonl: no such prompt file; run the prompts stage"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DeepSpecError, match=r"empty\.jsonl: no prompt in the file"):
        read_prompts(tmp_path / "empty.jsonl")


def test_a_line_is_in_the_file_before_the_next_is_asked_for(tmp_path, target):
    conversation = Conversation(target, Prompt.of_turns("a", "seed", ("x",)), 8, 64)
    conversation.add_answer([target.end], "stop")
    with Shard(tmp_path) as shard:
        sink = Sink(shard, Progress("test", 2, shown=False), seed=0)
        sink.finished(conversation)
        assert list(read_work(tmp_path).rows) == ["a"]
        sink.failed("b", "why")
        assert read_work(tmp_path).failures == {"b": "why"}


def test_seeds_depend_on_run_and_id_and_fit_31_bits():
    seeds = {conversation_seed(run, id) for run in (0, 1) for id in ("a", "b", "c")}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert conversation_seed(0, "a") == conversation_seed(0, "a")
