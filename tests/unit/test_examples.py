"""The examples run, on a tiny random target, and show what they say."""

from __future__ import annotations

import pytest

from deepspec.target.model import load_target
from examples import generate, new_drafter, tree
from tests.exporting import LAYERS, make_draft
from tests.tiny import make_target


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> list[str]:
    """`--target` and `--draft` of an untrained draft."""
    root = tmp_path_factory.mktemp("examples")
    directory = make_target(root / "target", layers=LAYERS)
    make_draft(root, load_target(directory, dtype="float32"), "dspark")
    return ["--target", str(directory), "--draft", str(root / "dspark")]


def test_plain_and_drafted_decoding_give_the_same_tokens(directories, capsys):
    plain, drafted = generate.main([*directories, "--tokens", "24"])
    assert len(plain) == 24 and plain == drafted
    assert "the same tokens: True" in capsys.readouterr().out


def test_a_tree_proposes_more_than_a_chain_and_a_controller_less(directories, capsys):
    answers = tree.main([*directories, "--tokens", "24"])
    verified = {name: max(out.stats.verified) for name, out in answers.items()}
    chain, traversal, recursive, cut = verified.values()
    assert chain == 3 < traversal == recursive
    assert cut < traversal
    assert len(capsys.readouterr().out.splitlines()) == len(answers)


def test_a_new_drafter_is_lossless_and_something_of_it_is_accepted(directories, capsys):
    plain, drafted = new_drafter.main([*directories[:2], "--tokens", "64"])
    assert len(plain) == 64 and plain == drafted
    assert float(capsys.readouterr().out.split("τ ")[1].split(";")[0]) > 1


def test_a_directory_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["example", "--target", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        new_drafter.run(new_drafter.main)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")
