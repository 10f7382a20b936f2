"""Progress: plain lines for a log, a bar for a terminal, JSON lines for a program."""

from __future__ import annotations

import json

import pytest

from deepspec.entry import guarded
from deepspec.errors import DeepSpecError
from deepspec.progress import CHANNEL, Progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which a test moves."""
    now = [100.0]
    monkeypatch.setattr("deepspec.progress.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def channel(monkeypatch, tmp_path):
    """Reads what came through the channel."""
    path = tmp_path / "progress.jsonl"
    monkeypatch.setenv(CHANNEL, str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_progress_prints_plain_lines_now_and_then_where_there_is_no_terminal(clock, capsys):
    with Progress("generate", total=10, done=2) as progress:
        for _ in range(4):
            clock[0] += 8
            progress.tokens(80)
            progress.advance()
    assert capsys.readouterr().err.splitlines() == [
        "generate: 2/10, ? left",
        "generate: 3/10, 10 tokens/s, 1m52s left",
        "generate: 5/10, 10 tokens/s, 53s left",
        "generate: 6/10, 10 tokens/s, 32s left",
    ]


def test_a_note_is_a_line_of_its_own_and_stays_out_of_the_next_ones(clock, capsys):
    with Progress("train", total=10) as progress:
        progress.advance(5)
        progress.note("loss 1.25")
        clock[0] += 20
        progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "train: 5/10, 0s left; loss 1.25"
    assert not any("loss" in line for line in lines[2:])


def test_in_a_terminal_a_bar_is_drawn(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Progress("generate [1]", total=10) as progress:
        progress.advance(10)
    said = capsys.readouterr().err
    assert "━━" in said and "10/10" in said and "generate [1]" in said


def test_the_channel_tells_counts_speed_and_end(clock, channel):
    with Progress("generate", total=10, done=2) as progress:
        clock[0] += 8
        progress.tokens(80)
        progress.advance()
        progress.advance()
    first, tokens, last = channel()
    assert (first["label"], first["done"], first["total"], first["state"]) == ("generate", 2, 10, "running")
    assert (first["tokens_per_second"], first["seconds_left"]) == (None, None)
    assert (tokens["done"], tokens["tokens_per_second"], tokens["state"]) == (2, 10.0, "running")
    assert (last["done"], last["seconds_left"], last["state"]) == (4, 24.0, "finished")
    assert first["time"] <= last["time"]


def test_a_job_that_an_exception_ended_is_stopped(channel):
    with pytest.raises(KeyError), Progress("train", total=2):
        raise KeyError
    assert channel()[-1]["state"] == "stopped"


def test_processes_that_show_nothing_send_nothing(channel, capsys):
    with Progress("train", total=2, shown=False) as progress:
        progress.advance()
        progress.note("loss 1")
    assert channel() == [] and capsys.readouterr().err == ""


def test_a_mistake_is_sent_and_a_fault_is_not(channel):
    def mistake() -> None:
        raise DeepSpecError("params.yaml: unknown key")

    assert guarded(mistake) == 2
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: print(1 / 0))
    assert [entry["error"] for entry in channel()] == ["params.yaml: unknown key"]


def test_a_channel_that_cannot_be_written_stops_no_work(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(CHANNEL, str(tmp_path))
    with Progress("train", total=1) as progress:
        progress.advance()
    assert caplog.text.count(CHANNEL) == 1
