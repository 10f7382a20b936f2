"""Evaluation tasks: the embedded ones load, a sample is stable, and a mistake is named."""

import gzip
import json
from pathlib import Path

import pytest

from deepspec.errors import DeepSpecError
from deepspec.evaluation.task import evaluation_texts, load_task, task_names
from deepspec.evaluation.word_problems import TEMPLATES, word_problems

HUMANEVAL_PROMPTS = 164
EMBEDDED = ("conversations", "humaneval", "word_problems")  # those that need neither hub nor files of others


def write_task(directory, **fields):
    path = directory / "mine.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items()))
    return path


def jsonl_task(directory, *lines, **fields):
    (directory / "mine.jsonl").write_text("".join(line + "\n" for line in lines))
    known = {"name": "mine", "version": "3", "category": "other", "source": "jsonl:mine.jsonl"}
    return write_task(directory, **(known | fields))


@pytest.mark.parametrize(
    ("name", "category", "least"),
    [("humaneval", "code", HUMANEVAL_PROMPTS), ("word_problems", "math", 60), ("conversations", "chat", 24)],
)
def test_an_embedded_task_has_its_prompts_and_a_version(name, category, least):
    task = load_task(name)
    assert (task.name, task.category) == (name, category)
    assert task.version and len(task.prompts) >= least
    assert all(turn.strip() for turns in task.prompts for turn in turns)


def test_humaneval_stands_in_a_python_block_with_its_docstring_whole():
    prompt = load_task("humaneval").prompts[0][0]
    assert prompt.startswith("Complete the following Python function.\n\n```python\nfrom typing import List")
    assert prompt.endswith('    """\n```')


def test_most_conversations_have_two_turns_and_no_two_are_alike():
    prompts = load_task("conversations").prompts
    assert sum(len(turns) == 2 for turns in prompts) > len(prompts) / 2
    assert len({turns[0] for turns in prompts}) == len(prompts)


def test_word_problems_are_seeded_and_use_every_template():
    assert len(TEMPLATES) >= 15
    assert word_problems(40, seed=1) == word_problems(40, seed=1) != word_problems(40, seed=2)
    openings = {turns[0][:12] for turns in word_problems(len(TEMPLATES), seed=0)}
    assert len(openings) > 0.8 * len(TEMPLATES)
    assert not any("{" in turns[0] for turns in word_problems(len(TEMPLATES), seed=0))


def test_a_sample_is_chosen_by_seed_and_keeps_the_order_of_the_source():
    everything = load_task("humaneval").prompts
    sample = load_task("humaneval", limit=8, seed=3).prompts
    places = [everything.index(turns) for turns in sample]
    assert len(places) == 8 and places == sorted(places)
    assert sample == load_task("humaneval", limit=8, seed=3).prompts
    assert sample != load_task("humaneval", limit=8, seed=4).prompts


def test_a_limit_above_the_size_takes_all():
    assert len(load_task("conversations", limit=10_000).prompts) == len(load_task("conversations").prompts)


def test_evaluation_texts_are_all_turns_of_all_prompts_without_the_frame():
    texts = evaluation_texts(["humaneval", "conversations"])
    turns = sum(len(prompt) for prompt in load_task("conversations").prompts)
    assert len(texts) == HUMANEVAL_PROMPTS + turns
    assert not any("Complete the following" in text for text in texts)


def test_a_task_of_ones_own_lies_beside_its_jsonl(tmp_path):
    path = jsonl_task(tmp_path, '{"turns": ["one", "two"]}', "", '{"prompt": "three"}', frame="Q: {prompt}")
    task = load_task(path)
    assert (task.name, task.version, task.prompts) == ("mine", "3", [["Q: one", "two"], ["Q: three"]])
    assert load_task(str(path)) == task


def test_a_task_reads_gzip_from_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "some_bench"
    package.mkdir()
    (package / "__init__.py").touch()
    with gzip.open(package / "data.jsonl.gz", "wt") as file:
        file.write('{"prompt": "add two numbers", "entry_point": "add"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    path = jsonl_task(tmp_path, source="package:some_bench/data.jsonl.gz")
    assert load_task(path).prompts == [["add two numbers"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("humanevl", "did you mean 'humaneval'?"),
        ("nowhere/mine.yaml", "nowhere/mine.yaml: no such task file"),
    ],
)
def test_an_unknown_task_is_named(name, message):
    with pytest.raises(DeepSpecError, match=message.replace("?", r"\?")):
        load_task(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"categry": "code"}, "unknown key 'categry'; did you mean 'category'?"),
        ({"category": "poetry"}, "category"),
        ({"source": "ftp:somewhere"}, "unknown source 'ftp:somewhere'"),
        ({"source": "generator:word_problem", "count": 3}, "did you mean 'word_problems'?"),
        ({"source": "generator:word_problems"}, "count"),
        ({"frame": "no slot"}, "`frame` has no {prompt}"),
        ({"source": "jsonl:absent.jsonl"}, "absent.jsonl: no such prompt file"),
        (
            {"source": "package:no_such_package_here/x.jsonl"},
            "'no_such_package_here', which is not installed: install deepspec[pipeline]",
        ),
    ],
)
def test_a_bad_task_file_gives_one_line_that_names_the_problem(tmp_path, fields, message):
    path = jsonl_task(tmp_path, '{"turns": ["one"]}', **fields)
    with pytest.raises(DeepSpecError) as caught:
        load_task(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_malformed_line_of_a_task_is_named_with_its_number(tmp_path):
    path = jsonl_task(tmp_path, '{"turns": ["one"]}', '{"turns": [')
    with pytest.raises(DeepSpecError, match=r"mine\.jsonl:2: malformed line"):
        evaluation_texts([path])


def test_an_empty_task_is_an_error(tmp_path):
    with pytest.raises(DeepSpecError, match="has no prompts"):
        load_task(jsonl_task(tmp_path))


# What the datasets of the hub hold, one row each: what is asked for, the row, and its turns.
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
HUB = {
    "gsm8k": (("openai/gsm8k", "main"), {"question": "1+1?", "answer": "#### 2"}, ["1+1?" + BOXED]),
    "math500": (("HuggingFaceH4/MATH-500", None), {"problem": "x?", "solution": "3"}, ["x?" + BOXED]),
    "aime25": (("math-ai/aime25", None), {"problem": "n?", "answer": "70"}, ["n?" + BOXED]),
    "mbpp": (("google-research-datasets/mbpp", "sanitized"), {"prompt": "Sort.", "code": "def"}, ["Sort."]),
    "livecodebench": (("json",), {"question_title": "T", "question_content": "Print."}, ["Print."]),
    "mt-bench": (("HuggingFaceH4/mt_bench_prompts", None), {"prompt": ["a", "b"]}, ["a", "b"]),
    "alpaca": (("tatsu-lab/alpaca", None), {"instruction": "Add.", "input": "1 2"}, ["Add.\n\n1 2"]),
    "arena-hard": (("lmarena-ai/arena-hard-auto-v0.1", None), {"turns": [{"content": "c"}]}, ["c"]),
    "spec-bench": (("json",), {"category": "qa", "turns": ["q", "r"]}, ["q", "r"]),
    "speed-bench": (("nvidia/SPEED-Bench", "qualitative"), {"turns": ["s"], "category": "rag"}, ["s"]),
}


@pytest.mark.parametrize("name", HUB)
def test_a_task_of_the_hub_asks_for_its_dataset_and_finds_the_turns(name, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([row])

    expected, row, turns = HUB[name]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(name)
    assert task.prompts == [turns]
    assert asked[0][0] == expected
    assert asked[0][1]["split"] in ("test", "train")


def test_every_task_is_tried():
    assert set(task_names()) == set(HUB) | set(EMBEDDED)


def test_an_unreachable_hub_names_the_file_that_would_do():
    with pytest.raises(
        DeepSpecError, match=r"gsm8k\.jsonl in a directory named by evaluate\.tasks_dir"
    ) as caught:
        load_task("gsm8k")
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    lines = "".join(f'{{"turns": ["question {i}", "and then?"]}}\n' for i in range(20))
    (tmp_path / "gsm8k.jsonl").write_text(lines)
    (tmp_path / "ours.jsonl").write_text(lines)
    return tmp_path


def test_a_local_file_stands_in_for_a_task_as_it_is(folder):
    task = load_task("gsm8k", tasks_dir=folder)
    assert task.prompts[3] == ["question 3", "and then?"]  # no frame around it
    assert (task.category, task.source) == ("math", "jsonl:gsm8k.jsonl")
    version = task.version
    (folder / "gsm8k.jsonl").write_text('{"turns": ["another"]}\n')
    changed = load_task("gsm8k", tasks_dir=folder)
    assert changed.version != version and changed.digest != task.digest
    assert load_task("humaneval", 1, tasks_dir=folder).source.startswith("package:")  # not there: as always


def test_a_local_file_needs_no_yaml(folder):
    task = load_task("ours", 5, seed=3, tasks_dir=folder)
    numbers = [int(turns[0].split()[1]) for turns in task.prompts]
    assert task.category == "other" and len(numbers) == 5 and numbers == sorted(numbers)
    assert (
        task
        == load_task("ours", 5, seed=3, tasks_dir=folder)
        != load_task("ours", 5, seed=4, tasks_dir=folder)
    )
    assert len(evaluation_texts(["ours"], folder)) == 40


def test_the_environment_goes_before_the_params(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSPEC_TASKS_DIR", str(folder))
    assert load_task("ours", tasks_dir="elsewhere").prompts
    monkeypatch.setenv("DEEPSPEC_TASKS_DIR", str(tmp_path / "absent"))
    with pytest.raises(DeepSpecError, match="absent: no such directory of tasks"):
        load_task("ours")


REAL = Path(__file__).parents[3] / "shared/eval_datasets"


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark prompts are not here")
def test_the_real_prompts_are_read_whole():
    sizes = {
        name: len(load_task(name, tasks_dir=REAL).prompts) for name in ("gsm8k", "humaneval", "mt-bench")
    }
    assert sizes == {"gsm8k": 1319, "humaneval": 164, "mt-bench": 80}
    assert all(len(turns) == 2 for turns in load_task("mt-bench", tasks_dir=REAL).prompts)
