"""Evaluation tasks: the embedded ones load, a sample is stable, and a mistake is named."""

import gzip
import json

import pytest

from deepspec.errors import DeepSpecError
from deepspec.evaluation.task import evaluation_texts, load_task, task_names
from deepspec.evaluation.word_problems import TEMPLATES, word_problems

HUMANEVAL_PROMPTS = 164


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


def test_the_embedded_tasks_are_these():
    assert task_names() == ["conversations", "humaneval", "word_problems"]


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
