"""Turns, percentiles, and systems in processes of their own."""

import time
from collections.abc import Callable

import pytest

from benchmarks.harness.timing import median_ratio, seconds_each, spread, take_turns
from benchmarks.harness.workers import Worker


def clock(name: str, order: list[str]) -> Callable[[], float]:
    def measure() -> float:
        order.append(name)
        return float(len(order))

    return measure


def test_systems_take_turns_after_a_warm_up() -> None:
    order: list[str] = []
    found = take_turns({name: clock(name, order) for name in "ab"}, rounds=2, warm_up=1)
    assert order == list("ababab")
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_time_ends_the_rounds_but_for_two() -> None:
    order: list[str] = []
    assert len(take_turns({"a": clock("a", order)}, rounds=9, until=time.monotonic())["a"]) == 2
    assert len(order) == 3
    assert len(take_turns({"a": clock("a", order)}, rounds=9, until=time.monotonic() + 60)["a"]) == 9


def test_percentiles_and_ratios() -> None:
    assert spread([0.001, 0.002, 0.003, 0.004, 0.005, 0.006], 1e3, 2) == {"ms_p20": 2, "ms_p50": 3.5, "ms_p80": 5}
    assert median_ratio([2, 6, 4], [1, 2, 4]) == 2
    called: list[int] = []
    assert seconds_each(lambda: called.append(1), 3, "cpu") >= 0
    assert len(called) == 3


class Counter:
    """What a worker holds."""

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, more: int) -> int:
        self.value += more
        if more == 0:
            raise SystemExit(7)
        return self.value


def test_a_worker_answers_until_its_process_ends() -> None:
    worker = Worker("counter", 1, Counter, 3).ready()
    assert worker.seconds_setup >= 0
    assert [worker.call("add", 2), worker.call("add", 4)] == [5, 9]
    worker.ask("add", 0)
    with pytest.raises(RuntimeError, match="counter: its process ended with 7"):
        worker.answer()
