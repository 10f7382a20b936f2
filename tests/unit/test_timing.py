"""Fair timing: order, warm-up, and what is taken off. The clock is a fake."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deepspec.evaluation import timing
from deepspec.evaluation.timing import Answering, FirstToken, rotated, timed, warm_up


class Clock:
    """Time that passes only when something decodes: each call takes the next of `seconds`."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds = 0.0, list(seconds)
        self.calls: list[tuple[list[int], int]] = []

    def answer(self, ids: list[int], max_new_tokens: int) -> str:
        self.calls.append((ids, max_new_tokens))
        self.now += self.seconds.pop(0)
        return "answer"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_each_goes_first_in_its_turn():
    assert [rotated("abc", by) for by in (0, 1, 2, 3)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_the_prefill_that_a_runtime_reports_is_taken_off(clock):
    class Reporting:
        def decode(self, work: list[int]) -> str:
            return clock.answer(work, 8)

        def prefill_s(self, work: list[int], output: str) -> float:
            return 2.0 * len(work)

    clock.seconds = [10.0]
    assert timed(Reporting(), [1, 2]) == ("answer", 6.0)


def test_the_prefill_is_the_better_of_two_first_tokens_after_an_unmeasured_one(clock):
    clock.seconds = [1.0, 5.0, 4.0]
    assert FirstToken(lambda ids: clock.answer(ids, 1)).seconds([7]) == 4.0


def test_runs_of_a_prompt_share_one_prefill_and_the_next_prompt_has_its_own(clock):
    first_token = FirstToken(lambda ids: clock.answer(ids, 1))
    runtime = Answering(clock.answer, 8, first_token)
    one, other = [7], [7]
    clock.seconds = [3.0, 3.0, 3.0, 10.0, 12.0]
    first_token.seconds(one)
    assert [timed(runtime, one)[1] for _ in range(2)] == [7.0, 9.0]
    clock.seconds = [2.0, 2.0, 2.0, 10.0]
    first_token.seconds(other)
    assert timed(runtime, other)[1] == 8.0


def test_a_warm_up_decodes_once_with_each(clock):
    clock.seconds = [1.0, 1.0]
    first_token = FirstToken(lambda ids: clock.answer(ids, 1))
    warm_up([Answering(clock.answer, n, first_token) for n in (4, 5)], [7])
    assert clock.calls == [([7], 4), ([7], 5)]
