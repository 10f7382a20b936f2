"""Work over many pieces: results in order, a bounded number ahead, and faults in a process are one line here."""

import os
import signal
import subprocess
import sys
import time

import pytest

from deepspec.errors import DeepSpecError
from deepspec.parallel import AHEAD, ALONE, in_pieces, ordered_map


def test_results_come_in_the_order_of_the_pieces_from_several_processes():
    def work(number):
        time.sleep(0.02 * (number % 3 == 0))
        return number, os.getpid()

    found = list(ordered_map(work, range(30), processes=3))
    assert [number for number, _ in found] == list(range(30))
    assert {pid for _, pid in found[:ALONE]} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in found[ALONE:]}


def test_a_small_job_and_a_single_core_start_no_process():
    assert set(ordered_map(lambda _: os.getpid(), range(ALONE), processes=3)) == {os.getpid()}
    assert set(ordered_map(lambda _: os.getpid(), range(50), processes=1)) == {os.getpid()}


def test_pieces_are_taken_as_results_are():
    taken = []
    results = ordered_map(lambda number: number, (taken.append(i) or i for i in range(1000)), processes=2)
    for _ in range(ALONE + 1):
        next(results)
    assert len(taken) <= ALONE + 2 * AHEAD + 1
    results.close()


def test_a_mistake_in_a_process_is_raised_here():
    def work(number):
        if number == 20:
            raise DeepSpecError("row 20 is bad")
        return number

    with pytest.raises(DeepSpecError, match="row 20 is bad"):
        list(ordered_map(work, range(40), processes=2))


def test_a_process_that_is_killed_is_one_line():
    def work(number):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DeepSpecError, match="a process of this stage was killed"):
        list(ordered_map(work, range(40), processes=2))


LONG = r"""
import os, time
from deepspec.parallel import ordered_map

def work(number):
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece: the processes share the pipe
    time.sleep(60 * (number > 4))

list(ordered_map(work, range(20), processes=2))
"""


def test_no_process_is_left_when_the_one_that_started_it_is_killed():
    with subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True) as started:
        pids = {int(started.stdout.readline()) for _ in range(6)} - {started.pid}
        started.kill()
        for _ in range(200):
            if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
                break
            time.sleep(0.05)
        assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_pieces_hold_so_many_things():
    assert list(in_pieces(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_pieces([], 2)) == []
