"""The chat shows every character once, marks what the draft wrote, and remembers the conversation."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.commands import chat
from deepspec.config import load_params
from deepspec.decoding.request import Generation, Stats
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.deployment import Deployment
from deepspec.errors import DeepSpecError
from deepspec.evaluation import measure
from deepspec.evaluation.runs import Run, prompt_seed
from deepspec.target.model import load_target
from tests.tiny import make_network, make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def settings(**changes) -> chat.Settings:
    defaults = dict.fromkeys(chat.Settings.__dataclass_fields__)
    return chat.Settings(**{**defaults, "no_draft": False, "params": "params.yaml", **changes})


def test_detokenizer_gives_back_the_text_whatever_the_tokens_split(tokenizer):
    text = "Tom's τ was 2.41 — naïve 🎉 done."
    detokenizer = chat.Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert "" in pieces  # a byte of an unfinished character showed nothing
    assert all("\ufffd" not in piece for piece in pieces)


def test_accepted_draft_tokens_are_coloured_and_the_targets_own_are_not(tokenizer):
    shown = []
    answer = chat.Answer(tokenizer, lambda piece, style: shown.append((piece, style)))
    a, b, c = tokenizer("abc")["input_ids"]
    answer.append([a, b, c], 2)
    answer.append([a], 0)
    assert shown == [("a", chat.ACCEPTED), ("b", chat.ACCEPTED), ("c", None), ("a", None)]
    assert answer.status().startswith("τ 2.00")
    assert answer.status().endswith("4 tokens")


def test_control_characters_do_not_reach_the_terminal(tokenizer):
    shown = []
    answer = chat.Answer(tokenizer, lambda piece, _: shown.append(piece))
    answer.append(tokenizer("a\x1b[2Jb\tc\n")["input_ids"], 0)
    assert "".join(shown) == "a[2Jb\tc\n"


def test_in_a_terminal_the_whole_answer_is_left_on_the_screen_in_colour(tokenizer):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=40, height=8, color_system="standard")
    long = " ".join(f"word{i}" for i in range(60))

    def produce(answer: chat.Answer) -> None:
        for token in tokenizer(long)["input_ids"]:
            answer.append([token], 1)

    chat._live(tokenizer, produce, console)
    final = screen.getvalue().rsplit("\x1b[2K", 1)[-1]
    assert "\x1b[32m" in final
    assert re.sub(r"\x1b\[[0-9;]*m", "", final).split() == long.split()


def test_ctrl_c_ends_the_answer_and_not_the_chat(tokenizer):
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=8)

    def produce(answer: chat.Answer) -> None:
        answer.append(tokenizer("half")["input_ids"], 0)
        raise KeyboardInterrupt

    answer = chat._live(tokenizer, produce, console)
    assert tokenizer.decode(answer.tokens) == "half"
    assert "[stopped]" in console.file.getvalue()


def test_each_turn_sees_the_earlier_ones_until_reset(tiny_target, monkeypatch, tokenizer):
    prompts = []

    def generate(deployment, prompt_ids, on_tokens, **options):
        tokenizer = deployment.target.tokenizer
        prompts.append(tokenizer.decode(prompt_ids))
        tokens = tokenizer("fine")["input_ids"]
        on_tokens(tokens, 0)
        return [Generation(0, prompt_ids, tokens, "stop", Stats())]

    monkeypatch.setattr(Deployment, "generate", generate)
    words = ["chat", "--no-draft", "--target", str(tiny_target), "--system", "be brief"]
    result = CliRunner().invoke(app, words, input="first\n\nsecond\n/reset\nthird\n/quit\nfourth\n")
    assert result.exit_code == 0
    assert result.output.count("fine\n") == 3
    assert "first" in prompts[1]
    assert "fine" in prompts[1]
    assert "second" in prompts[1]
    assert "first" not in prompts[2]
    assert all("be brief" in prompt for prompt in prompts)
    assert len(prompts) == 3


def test_chat_without_a_draft_decodes_the_target_itself(tiny_target):
    words = ["chat", "--no-draft", "--target", str(tiny_target), "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, words, input="What is the sum?\n")
    assert result.exit_code == 0
    assert "τ 1.00" in result.output
    assert "8 tokens" in result.output


QUESTION = "Tom has 12 apples and gives 5 of them to his sister; how many does he have left?"
DECODES = {
    "cost": {"tree": {"type": "best_first", "width": 2, "nodes": 5}, "controller": {"type": "cost"}},
    "fixed": {"lookup": None, "verify": "standard", "controller": {"type": "fixed", "length": 1}},
    "sampled": {"tree": {"type": "sampled", "branching": [2, 2]}, "controller": {"type": "scheduler"}},
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DECODES)
def test_chat_decodes_as_the_evaluation_does(name, temperature, tiny_target, tmp_path, monkeypatch):
    """The same tokens in the same rounds, by the tree, rule and controller of `evaluate.decode`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = load_target(tiny_target)
    network = make_network(target, "dspark", layers=1, block_size=3, markov_rank=4, target_layer_ids=[0, 1])
    draft = tmp_path / "draft"
    write_drafter(draft, network.description(), stored_weights(network), target, {})
    (tmp_path / "mine.jsonl").write_text(json.dumps({"turns": [QUESTION]}) + "\n")
    raw = yaml.safe_load((ROOT / "params.smoke.yaml").read_text())
    raw["evaluate"] |= {
        "tasks": ["mine"],
        "tasks_dir": str(tmp_path),
        "prompts_per_task": 1,
        "temperatures": [temperature],
        "max_new_tokens": 24,
        "lossless_prompts": 1,
        "lossless_new_tokens": 2,
        "decode": DECODES[name],
        "traces": 0,
        "sweeps": None,
        "throughput": None,
    }
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(raw))
    read = load_params(params)
    outcome = measure.evaluate({"d": draft}, tiny_target, read.evaluate, 0, tmp_path / "work")["d"]
    measured = outcome.prompts[0]["runs"]["draft"]

    seen, real = [], Deployment.generate
    monkeypatch.setattr(
        Deployment, "generate", lambda *args, **options: seen.extend(real(*args, **options)) or seen
    )
    seed = prompt_seed(0, "mine", [QUESTION], 0) - 1  # a turn's seed counts the messages so far
    words = ["chat", "--target", str(tiny_target), "--drafter", str(draft), "--params", str(params)]
    words += ["--temperature", str(temperature), "--max-new-tokens", "24", "--seed", str(seed)]
    result = CliRunner().invoke(app, words, input=f"{QUESTION}\n")
    assert result.exit_code == 0, result.output
    chatted = Run()
    chatted.add(seen[0], 0.0)
    assert len(seen) == 1
    assert chatted.accepted == measured["accepted"]
    assert chatted.drafted == measured["drafted"]
    assert chatted.output == measured["output"]


def test_no_such_draft_names_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/drafts/mine").mkdir(parents=True)
    with pytest.raises(DeepSpecError, match=r"no such draft: yours \(in data/drafts: mine\)"):
        chat.find_draft(settings(drafter="yours"))
    assert chat.find_draft(settings(drafter="mine")).name == "mine"


def test_a_target_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["chat", "--no-draft"], input="hello\n")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: data/target: no target yet: run `dvc repro`")
    assert result.stderr.count("\n") == 1
