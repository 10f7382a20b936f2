"""Evaluation tasks: the embedded ones load, those of the hub from a copy, a sample is stable, a mistake is named."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from deepspec.errors import DeepSpecError
from deepspec.evaluation.params import EvaluateParams
from deepspec.files import digest, file_digest
from deepspec.tasks.task import TASKS, evaluation_texts, load_task, task_names
from deepspec.tasks.word_problems import TEMPLATES, word_problems

HUMANEVAL_PROMPTS = 164
EMBEDDED = ["conversations", "humaneval", "word_problems"]
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PUBLISHED = Path(__file__).parents[3] / "shared" / "eval_datasets"  # real prompts, where a checkout has them

# Of every task: two rows with the columns that the real dataset has, and the prompts they make.
STAND_INS = {
    "gsm8k": (
        [{"question": "Two and two?", "answer": "#### 4"}, {"question": "Three?", "answer": "#### 3"}],
        [["Two and two?" + BOXED], ["Three?" + BOXED]],
    ),
    "math500": (
        [
            {"problem": p, "solution": "s", "answer": "4", "subject": "Algebra", "level": 1, "unique_id": p}
            for p in ("$2+2$", "$1+2$")
        ],
        [["$2+2$" + BOXED], ["$1+2$" + BOXED]],
    ),
    "aime25": (
        [
            {"problem_idx": i, "problem": p, "answer": 70, "problem_type": ["Algebra"]}
            for i, p in enumerate(["Find $n$.", "Find $m$.\n"])
        ],
        [["Find $n$." + BOXED], ["Find $m$." + BOXED]],
    ),
    "mbpp": (
        [
            {
                "source_file": "f",
                "task_id": i,
                "prompt": p,
                "code": "c",
                "test_imports": [],
                "test_list": ["assert x"],
            }
            for i, p in enumerate(["Write a function.", "Write another."])
        ],
        [["Write a function."], ["Write another."]],
    ),
    "livecodebench": (
        [
            {
                "question_title": "a",
                "question_content": "Add.",
                "platform": "leetcode",
                "starter_code": "def f(): pass",
            },
            {"question_title": "b", "question_content": "Read.", "platform": "atcoder", "starter_code": ""},
        ],
        None,
    ),
    "mt-bench": (
        [
            {"category": "writing", "prompt": ["Write.", "Rewrite."], "reference": [], "prompt_id": 1},
            {"category": "math", "prompt": ["Add.", "Subtract."], "reference": ["4", "0"], "prompt_id": 2},
        ],
        [["Write.", "Rewrite."], ["Add.", "Subtract."]],
    ),
    "alpaca": (
        [
            {"instruction": "Name a color.", "input": "", "output": "Red", "text": "t"},
            {"instruction": "Translate.", "input": "Hallo", "output": "Hello", "text": "t"},
        ],
        [["Name a color."], ["Translate.\n\nInput:\nHallo"]],
    ),
    "arena-hard": (
        [
            {
                "uid": u,
                "category": "hard_prompt",
                "subcategory": "coding",
                "language": "English",
                "prompt": f"Do {u}.",
            }
            for u in "ab"
        ],
        [["Do a."], ["Do b."]],
    ),
    "spec-bench": (
        [
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
            {"question_id": 161, "category": "qa", "turns": ["Who?"]},
        ],
        [["Write.", "Rewrite."], ["Who?"]],
    ),
    "speed-bench": (
        [
            {
                "question_id": q,
                "category": "coding",
                "sub_category": "s",
                "turns": [f"Code {q}.", "More."],
                "source": "x",
            }
            for q in "ab"
        ],
        [["Code a.", "More."], ["Code b.", "More."]],
    ),
}


@pytest.fixture(autouse=True)
def no_outside_tasks(monkeypatch, tmp_path):
    monkeypatch.delenv("DEEPSPEC_TASKS_DIR", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def stand_in(directory, name, rows):
    """A copy of a task's YAML that names a directory with a small dataset of the same shape."""
    raw = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    copy = directory / "copy"
    files = raw.get("files", [])
    files = [files] if isinstance(files, str) else files[: len(rows)]
    lines = [json.dumps(row) + "\n" for row in rows]
    if raw["source"].startswith("url:"):
        copy.mkdir()
        (copy / "question.jsonl").write_text("".join(lines))
        raw["source"] = f"url:file://{copy}/question.jsonl"
        return write_yaml(directory, raw)
    raw["source"] = f"hub:{copy}"
    if files:
        for number, file in enumerate(files):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_text(lines[number] if len(files) > 1 else "".join(lines))
        raw["files"] = files
        (copy / "script.py").write_text("raise SystemExit('a dataset script is never run')\n")
        return write_yaml(directory, raw)
    config, split = raw.get("config", "default"), raw["split"]
    (copy / config).mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(copy / config / f"{split}-00000-of-00001.parquet")
    card = {"config_name": config, "data_files": [{"split": split, "path": f"{config}/{split}-*"}]}
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [card]})}---\n")
    return write_yaml(directory, raw)


def write_yaml(directory, raw):
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def local(directory, name, *prompts):
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in prompts))
    return path


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
    assert all(chat.plain and turn.strip() for chat in task.prompts for turn in chat.turns)


def test_the_tasks_of_the_project_are_these():
    assert task_names() == sorted([*EMBEDDED, *STAND_INS])


@pytest.mark.parametrize("name", STAND_INS)
def test_a_task_of_the_hub_loads_from_a_copy_with_the_same_columns(tmp_path, name):
    rows, prompts = STAND_INS[name]
    path = stand_in(tmp_path, name, rows)
    task = load_task(path)
    assert (task.name, len(task.prompts)) == (name, 2)
    assert prompts is None or task.asked == prompts
    assert str(tmp_path) not in task.source or task.source.startswith("url:file:")
    bare = [turn.removesuffix(BOXED) for turns in task.asked for turn in turns]
    assert name == "livecodebench" or evaluation_texts([path]) == [
        text + "\n" * ("m$" in text) for text in bare
    ]


def test_livecodebench_gives_the_starter_code_where_there_is_one(tmp_path):
    path = stand_in(tmp_path, "livecodebench", STAND_INS["livecodebench"][0])
    with_code, without = (turns[0] for turns in load_task(path).asked)
    assert with_code.endswith("\n\nAdd.\n\nStart from this code:\n\n```python\ndef f(): pass\n```")
    assert without.endswith("```python.\n\nRead.")


def test_placeholders_of_speed_bench_are_an_error_that_says_what_to_do(tmp_path):
    rows = STAND_INS["speed-bench"][0]
    empty = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    rows = [rows[0], rows[1] | {"turns": [f"{empty}\n\nTranslate {{question}}"]}]
    with pytest.raises(
        DeepSpecError, match=r"1 of the 2 prompts .* are placeholders.*put speed-bench\.jsonl"
    ):
        load_task(stand_in(tmp_path, "speed-bench", rows))


def test_a_dataset_without_the_column_names_those_it_has(tmp_path):
    path = stand_in(tmp_path, "gsm8k", [{"query": "Two and two?", "answer": "4"}])
    with pytest.raises(DeepSpecError, match="no column 'question'; found query, answer"):
        load_task(path)


def test_a_row_without_a_turn_is_named_with_its_number(tmp_path):
    path = stand_in(tmp_path, "gsm8k", [{"question": "Two?", "answer": "2"}, {"question": "", "answer": "4"}])
    with pytest.raises(DeepSpecError, match=r"hub:copy:main/test, row 1: 'question' has no user turn"):
        load_task(path)


def test_several_columns_are_turns_and_of_messages_the_user_ones_count(tmp_path):
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    Dataset.from_list([{"first": "a", "then": chat}]).to_json(tmp_path / "train.jsonl")
    path = write_task(
        tmp_path, name="m", version="1", category="chat", source=f"hub:{tmp_path}", columns=["first", "then"]
    )
    assert load_task(path).asked == [["a", "b"]]


@pytest.mark.parametrize("name", ["gsm8k", "livecodebench", "spec-bench"])
def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_file(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\n(offline)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DeepSpecError) as caught:
        load_task(name)
    message = str(caught.value)
    assert "could not be loaded" in message and f"put {name}.jsonl" in message and "\n" not in message
    assert "evaluate.tasks_dir or $DEEPSPEC_TASKS_DIR" in message
    with pytest.raises(DeepSpecError, match=f"put {name}.jsonl, .* into {tmp_path}"):
        evaluation_texts([name], tmp_path)


# A directory of prompts


def test_a_local_file_beats_the_hub_and_is_taken_as_it_is(tmp_path):
    path = local(tmp_path / "mine", "gsm8k", ["One?\nBe brief.", "Why?"], ["Two?\nBe brief."])
    task = load_task("gsm8k", tasks_dir=tmp_path / "mine")
    assert task.asked == [["One?\nBe brief.", "Why?"], ["Two?\nBe brief."]]
    assert (task.name, task.category, task.source) == ("gsm8k", "math", "jsonl:gsm8k.jsonl")
    assert task.version == file_digest(path)[:16]
    assert task.digest == digest(json.dumps(task.asked))


def test_a_local_file_needs_no_yaml_and_may_be_compressed(tmp_path):
    with gzip.open(tmp_path / "house-style.jsonl.gz", "wt") as file:
        file.write('{"turns": ["one"]}\n')
    task = load_task("house-style", tasks_dir=tmp_path)
    assert (task.name, task.category, task.asked) == ("house-style", "other", [["one"]])
    assert task.source == "jsonl:house-style.jsonl.gz"


def test_the_environment_beats_params(tmp_path, monkeypatch):
    local(tmp_path / "params", "gsm8k", ["params"])
    local(tmp_path / "environment", "gsm8k", ["environment"])
    monkeypatch.setenv("DEEPSPEC_TASKS_DIR", str(tmp_path / "environment"))
    assert load_task("gsm8k", tasks_dir=tmp_path / "params").asked == [["environment"]]
    assert evaluation_texts(["gsm8k"], tmp_path / "params") == ["environment"]


def test_a_directory_that_is_not_there_is_named_with_its_key(tmp_path, monkeypatch):
    with pytest.raises(DeepSpecError, match=r"evaluate\.tasks_dir: .*absent is not a directory"):
        load_task("humaneval", tasks_dir=tmp_path / "absent")
    monkeypatch.setenv("DEEPSPEC_TASKS_DIR", str(tmp_path / "absent"))
    with pytest.raises(DeepSpecError, match=r"\$DEEPSPEC_TASKS_DIR: .*absent is not a directory"):
        load_task("humaneval")


def test_a_directory_without_the_file_changes_nothing(tmp_path):
    assert load_task("humaneval", tasks_dir=tmp_path) == load_task("humaneval")
    assert EvaluateParams(tasks=["humaneval"]).tasks_dir is None


def test_an_empty_local_file_is_an_error(tmp_path):
    local(tmp_path, "gsm8k")
    with pytest.raises(DeepSpecError, match=r"gsm8k\.jsonl: has no prompts"):
        load_task("gsm8k", tasks_dir=tmp_path)


def test_a_sample_of_a_local_file_is_stable_and_in_order(tmp_path):
    local(tmp_path, "gsm8k", *([f"{i}?", f"and {i}?"] for i in range(50)))
    sample = load_task("gsm8k", limit=9, seed=1, tasks_dir=tmp_path)
    places = [int(turns[0].rstrip("?")) for turns in sample.asked]
    assert places == sorted(places) and len(places) == 9 and all(len(turns) == 2 for turns in sample.asked)
    assert sample == load_task("gsm8k", limit=9, seed=1, tasks_dir=tmp_path)
    assert sample.digest != load_task("gsm8k", limit=9, seed=2, tasks_dir=tmp_path).digest


def test_the_frame_that_local_prompts_share_is_no_evaluation_text(tmp_path):
    local(tmp_path, "gsm8k", ["Q: How many geese" + BOXED, "Why?"], ["Q: Name it" + BOXED])
    assert evaluation_texts(["gsm8k"], tmp_path) == ["How many geese", "Why?", "Name it"]
    local(tmp_path, "gsm8k", ["All alone" + BOXED])
    assert evaluation_texts(["gsm8k"], tmp_path) == ["All alone" + BOXED]


@pytest.mark.parametrize(
    ("name", "prompts", "turns"),
    [("gsm8k", 1319, 1), ("humaneval", 164, 1), ("mt-bench", 80, 2), ("aime25", 30, 1)],
)
def test_the_published_prompts_load_from_their_directory(name, prompts, turns):
    if not (PUBLISHED / f"{name}.jsonl").is_file():
        pytest.skip("the published prompts are not here")
    task = load_task(name, tasks_dir=PUBLISHED)
    assert len(task.prompts) == prompts and {len(each) for each in task.asked} == {turns}
    frame = (
        yaml.safe_load((TASKS / f"{name}.yaml").read_text()).get("frame", "{prompt}").removeprefix("{prompt}")
    )
    assert name == "humaneval" or all(each[0].endswith(frame) for each in task.asked)
    texts = evaluation_texts([name], PUBLISHED)
    assert len(texts) == prompts * turns and not any("step by step, and put" in text for text in texts)


def test_humaneval_stands_in_a_python_block_with_its_docstring_whole():
    prompt = load_task("humaneval").asked[0][0]
    assert prompt.startswith("Complete the following Python function.\n\n```python\nfrom typing import List")
    assert prompt.endswith('    """\n```')


def test_most_conversations_have_two_turns_and_no_two_are_alike():
    prompts = load_task("conversations").asked
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
    turns = sum(len(turns) for turns in load_task("conversations").asked)
    assert len(texts) == HUMANEVAL_PROMPTS + turns
    assert not any("Complete the following" in text for text in texts)


def test_a_task_of_ones_own_lies_beside_its_jsonl(tmp_path):
    path = jsonl_task(tmp_path, '{"turns": ["one", "two"]}', "", '{"prompt": "three"}', frame="Q: {prompt}")
    task = load_task(path)
    assert (task.name, task.version, task.asked) == ("mine", "3", [["Q: one", "two"], ["Q: three"]])
    assert load_task(str(path)) == task


def test_a_task_reads_gzip_from_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "some_bench"
    package.mkdir()
    (package / "__init__.py").touch()
    with gzip.open(package / "data.jsonl.gz", "wt") as file:
        file.write('{"prompt": "add two numbers", "entry_point": "add"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    path = jsonl_task(tmp_path, source="package:some_bench/data.jsonl.gz")
    assert load_task(path).asked == [["add two numbers"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("humanevl", "did you mean 'humaneval'?"),
        ("gsm8", "did you mean 'gsm8k'?"),
        ("houses", "path of a .yaml, or put houses.jsonl into evaluate.tasks_dir or \\$DEEPSPEC_TASKS_DIR"),
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
        ({"colums": "prompt"}, "unknown key 'colums'; did you mean 'columns'?"),
        ({"columns": "prompt"}, "`columns` belongs to a source of hub: or url:"),
        ({"config": "main"}, "`config` belongs to a source of hub:"),
        ({"source": "hub:a/b", "append": {"input": "more"}}, "`append.input` has no {input}"),
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
