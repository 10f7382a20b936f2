"""git as a command: its words on one line, and nothing where nothing can be told."""

from __future__ import annotations

import os

import pytest

from deepspec.errors import DeepSpecError
from deepspec.git import git, git_or_none


def test_what_git_says_comes_without_white_space(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert git(tmp_path, "rev-parse", "--is-inside-work-tree") == "true"


def test_a_failure_is_git_s_own_line(tmp_path):
    with pytest.raises(DeepSpecError, match=r"^git rev-parse failed: fatal: not a git repository"):
        git(tmp_path, "rev-parse", "HEAD")
    assert git_or_none(tmp_path, "rev-parse", "HEAD") is None


def test_without_git_there_is_one_line_too(tmp_path):
    with pytest.raises(DeepSpecError, match="git is not installed"):
        git(tmp_path, "status", env=os.environ | {"PATH": str(tmp_path)})
