"""The stopping schedule: every rule, and every refusal by its message."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smi_fast.config import InversionConfig
from smi_fast.method.strategies.stops import PAPER_STOPS
from smi_fast.schedule import Stage, check_stops, kept_after, plan_stages, sparsity

NAN, INF = math.nan, math.inf


def test_the_papers_schedule() -> None:
    stages = plan_stages(196, PAPER_STOPS, 4000)
    assert [stage.kept for stage in stages] == [196, 137, 95, 66, 46]
    assert [(stage.start, stage.end) for stage in stages] == [(0, 50), (50, 100), (100, 200), (200, 300), (300, 4000)]
    assert [stage.length for stage in stages] == [50, 50, 100, 100, 3700]
    assert sparsity(stages, 196) == pytest.approx(150 / 196)


def test_no_stops_is_one_dense_stage() -> None:
    assert plan_stages(49, (), 7) == (Stage(0, 7, 49),)
    assert sparsity(plan_stages(49, (), 7), 49) == 0


def test_consecutive_stops_and_a_stop_at_1() -> None:
    stages = plan_stages(16, ((1, 0.5), (2, 0.5), (3, 0.5)), 4)
    assert stages == (Stage(0, 1, 16), Stage(1, 2, 8), Stage(2, 3, 4), Stage(3, 4, 2))


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 0.9)), max_size=5))
def test_stages_tile_the_iterations(patches: int, gaps: list[tuple[int, float]]) -> None:
    iterations = [sum(gap for gap, _ in gaps[: i + 1]) for i in range(len(gaps))]
    stops = tuple((iteration, ratio) for iteration, (_, ratio) in zip(iterations, gaps, strict=True))
    end = (iterations[-1] if iterations else 0) + 1
    counts = [patches]
    for _, ratio in stops:
        counts.append(math.floor(counts[-1] * (1 - ratio) + 1e-9))
    if min(counts) == 0:
        with pytest.raises(ValueError, match="leaves no patch"):
            plan_stages(patches, stops, end)
        return
    stages = plan_stages(patches, stops, end)
    assert [stage.kept for stage in stages] == counts
    assert [stage.start for stage in stages] == [0, *iterations]
    assert [stage.end for stage in stages] == [*iterations, end]


@pytest.mark.parametrize(
    ("kept", "ratio", "want"), [(196, 0.3, 137), (10, 0.9, 1), (10, 0.1, 9), (100, 0.29, 71), (1, 0.3, 0), (3, 0.5, 1)]
)
def test_kept_after_counts_down(kept: int, ratio: float, want: int) -> None:
    assert kept_after(kept, ratio) == want


@pytest.mark.parametrize(
    ("patches", "stops", "message"),
    [
        (3, ((5, 0.7),), r"\(5, 0.7\): leaves no patch of the 3"),
        (4, ((1, 0.5), (2, 0.5), (3, 0.5)), r"\(3, 0.5\): leaves no patch of the 1"),
        (196, ((5, 1e-12),), r"\(5, 1e-12\): drops none of the 196"),
    ],
)
def test_plan_refuses(patches: int, stops: tuple[tuple[int, float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(patches, stops, 10)


BAD_STOPS: list[tuple[tuple[tuple[Any, Any], ...], str]] = [
    (((0, 0.3),), "integer of at least 1"),
    (((-1, 0.3),), "integer of at least 1"),
    (((2.0, 0.3),), "integer of at least 1"),
    (((True, 0.3),), "integer of at least 1"),
    (((10, 0.3),), "before the last iteration.*iterations=10"),
    (((11, 0.3),), "before the last iteration"),
    (((5, 0.3), (5, 0.3)), "iteration 5 is named twice"),
    (((5, 0.3), (4, 0.3)), "comes after a stop at 5"),
    (((5, 0.0),), "strictly between 0 and 1"),
    (((5, 1.0),), "strictly between 0 and 1"),
    (((5, -0.1),), "strictly between 0 and 1"),
    (((5, NAN),), "strictly between 0 and 1"),
    (((5, INF),), "strictly between 0 and 1"),
]


@pytest.mark.parametrize(("stops", "message"), BAD_STOPS)
def test_bad_stops_are_refused_everywhere(stops: tuple[tuple[Any, Any], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stops(stops, 10)
    with pytest.raises(ValueError, match=message):
        plan_stages(196, stops, 10)
    with pytest.raises(ValueError, match=message):
        InversionConfig(iterations=10, stops=stops)


def test_good_stops_pass() -> None:
    check_stops((), 1)
    check_stops(((1, 0.001), (9, 0.999)), 10)
