"""How a stage fails: one line and a status, and no traceback hides a real bug."""

from __future__ import annotations

import errno
import logging
import os
from types import SimpleNamespace

import pytest

from deepspec.entry import TELEMETRY_OFF, guarded, quiet_environment
from deepspec.errors import DeepSpecError


def failing(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DeepSpecError("params.yaml: no such file"), 2, "error: params.yaml: no such file"),
        (OSError(errno.ENOSPC, "No space left", "data/x"), 2, "error: the disk is full (data/x);"),
        (KeyboardInterrupt(), 130, "interrupted; run again to continue"),
    ],
)
def test_each_mistake_has_its_line_and_status(error, status, line, capsys):
    assert guarded(failing(error)) == status
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)


def test_a_full_disk_is_seen_behind_a_librarys_own_words(monkeypatch, capsys):
    monkeypatch.setattr("deepspec.entry.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert guarded(failing(RuntimeError("PytorchStreamWriter failed writing file data/0"))) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: print(1 / 0))


def test_success_is_zero():
    assert guarded(lambda: None) == 0


def test_entry_points_turn_telemetry_off(monkeypatch):
    for name in TELEMETRY_OFF:
        monkeypatch.delenv(name, raising=False)
    quiet_environment()
    assert {name: os.environ[name] for name in TELEMETRY_OFF} == TELEMETRY_OFF


def test_what_the_library_logs_is_shown_a_message_a_line(capsys):
    def work() -> None:
        log = logging.getLogger("deepspec.training.run")
        log.debug("unseen")
        log.info("a real decode: %s [1] " + "x" * 200, "greedy 1.500")
        log.warning("left out: %s", "dspark")

    for _ in range(2):
        assert guarded(work) == 0
    said = capsys.readouterr()
    lines = ["a real decode: greedy 1.500 [1] " + "x" * 200, "warning: left out: dspark"]
    assert said.err.splitlines() == lines * 2 and said.out == ""
