"""The stopping schedule and the configuration: every rule, and every refusal by its message."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smi_fast.config import PAPER_STOPS, PRESETS, TV_WEIGHTS, InversionConfig, check_stops
from smi_fast.schedule import Stage, kept_after, plan_stages, sparsity

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


BAD_FIELDS: list[tuple[str, Any]] = [
    *[("iterations", value) for value in (0, -1, 10.0, True)],
    *[("stops", value) for value in (5, ((5,),), ((5, None),), ((5, "a"),))],
    *[("preset", value) for value in ("papers", "", None, [])],
    *[("seed", value) for value in (-1, 2**63, 0.0, False)],
    *[("lr", value) for value in (0.0, -0.1, NAN, INF, "0.1", True)],
    *[("lr_schedule", value) for value in ("linear", None)],
    *[("betas", value) for value in ((0.5,), (0.5, 0.9, 0.9), (0.5, 1.0), (-0.1, 0.9), (NAN, 0.9), 0.5, ("a", 0.9))],
    *[("flip", value) for value in ("no", 1, None)],
    *[("eps", value) for value in (0.0, -1e-8, NAN, INF)],
    *[("jitter", value) for value in (-0.1, 0.51, NAN, "0.1")],
    *[("tv_norm", value) for value in ("l2", "")],
    *[("tv_weight", value) for value in (-1e-4, NAN, INF)],
    *[("l2_weight", value) for value in (-1e-4, NAN, INF, None)],
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_fields_are_named_with_their_value(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"stops": (), name: value}
    with pytest.raises(ValueError, match=rf"^{name}=") as error:
        InversionConfig(**fields)
    assert f"{name}={value!r}: must" in str(error.value)


GOOD_FIELDS: list[tuple[str, Any]] = [
    ("iterations", 1),
    ("seed", 2**63 - 1),
    ("betas", (0.0, 0.0)),
    ("jitter", 0),
    ("jitter", 0.5),
    ("tv_weight", 0),
    ("l2_weight", 0),
]


@pytest.mark.parametrize(("name", "value"), GOOD_FIELDS)
def test_the_edges_of_the_rules_pass(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"stops": (), name: value}
    assert getattr(InversionConfig(**fields), name) == value


def test_defaults_are_the_papers() -> None:
    config = InversionConfig()
    assert (config.iterations, config.stops, config.preset) == (4000, PAPER_STOPS, "paper")
    assert (config.lr, config.betas, config.eps, config.jitter, config.flip) == (0.25, (0.5, 0.99), 1e-8, 1 / 8, True)


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_a_preset_settles_norm_and_weight(preset: Any) -> None:
    config = InversionConfig(preset=preset)
    assert config.rules == PRESETS[preset]
    assert config.resolved_tv_norm == PRESETS[preset].tv_norm
    assert config.resolved_tv_weight == TV_WEIGHTS[config.resolved_tv_norm]


def test_what_is_given_overrides_the_preset() -> None:
    config = InversionConfig(tv_norm="image", tv_weight=0.0)
    assert (config.resolved_tv_norm, config.resolved_tv_weight) == ("image", 0.0)
    assert InversionConfig(tv_norm="image").resolved_tv_weight == TV_WEIGHTS["image"]


@pytest.mark.parametrize(
    "config",
    [
        InversionConfig(),
        InversionConfig(iterations=10, stops=((1, 0.1), (9, 0.25)), preset="reference", seed=3, tv_norm="image"),
        InversionConfig(stops=(), betas=(0.9, 0.999), lr_schedule="cosine", flip=False, tv_weight=1e-3, l2_weight=0.5),
    ],
)
def test_round_trip_through_json(config: InversionConfig) -> None:
    text = json.dumps(config.to_dict())
    again = InversionConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)


def test_from_dict_fills_in_defaults_and_checks() -> None:
    assert InversionConfig.from_dict({}) == InversionConfig()
    assert InversionConfig.from_dict({"stops": [[5, 1 / 2]], "seed": 2}) == InversionConfig(stops=((5, 0.5),), seed=2)
    with pytest.raises(ValueError, match="lr=-1"):
        InversionConfig.from_dict({"lr": -1})


def test_from_dict_names_unknown_fields() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['learning_rate', 'steps'\]; known: .*'iterations'"):
        InversionConfig.from_dict({"steps": 5, "learning_rate": 0.1})
