"""The recipe: its rules, its shorthand, what couples a batch, and its form as JSON."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from smi_fast.config import InversionConfig
from smi_fast.method.priors import L2, TotalVariation
from smi_fast.method.priors.total_variation import WEIGHTS
from smi_fast.method.strategies.stops import PAPER_STOPS, Stops

NAN, INF = math.nan, math.inf

BAD_FIELDS: list[tuple[str, Any]] = [
    *[("iterations", value) for value in (0, -1, 10.0, True)],
    *[("stops", value) for value in (5, ((5,),), ((5, None),), ((5, "a"),))],
    *[("preset", value) for value in ("papers", "", [])],
    *[("seed", value) for value in (-1, 2**63, 0.0, False)],
    *[("lr", value) for value in (0.0, -0.1, NAN, INF, "0.1", True)],
    *[("lr_schedule", value) for value in ("linear", None)],
    *[("betas", value) for value in ((0.5,), (0.5, 0.9, 0.9), (0.5, 1.0), (-0.1, 0.9), (NAN, 0.9), 0.5, ("a", 0.9))],
    *[("flip", value) for value in ("no", 1, None)],
    *[("eps", value) for value in (0.0, -1e-8, NAN, INF)],
    *[("jitter", value) for value in (-0.1, 0.51, NAN, "0.1")],
    *[("tv_norm", value) for value in ("l2", "")],
    *[("tv_weight", value) for value in (-1e-4, NAN, INF)],
    *[("l2_weight", value) for value in (-1e-4, NAN, INF)],
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_fields_are_named_with_their_value(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"stops": (), name: value}
    with pytest.raises(ValueError, match=rf"{name}=") as error:
        InversionConfig(**fields)
    assert "must" in str(error.value)


GOOD_FIELDS: list[tuple[str, Any]] = [
    ("iterations", 1),
    ("seed", 2**63 - 1),
    ("betas", (0.0, 0.0)),
    ("jitter", 0),
    ("jitter", 0.5),
]


@pytest.mark.parametrize(("name", "value"), GOOD_FIELDS)
def test_the_edges_of_the_rules_pass(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"stops": (), name: value}
    assert getattr(InversionConfig(**fields), name) == value


def test_defaults_are_the_papers() -> None:
    config = InversionConfig()
    assert (config.iterations, config.strategy, config.loss) == (4000, Stops(PAPER_STOPS), "sum")
    assert config.priors == (TotalVariation(1e-4, "pixel"),)
    assert (config.lr, config.betas, config.eps, config.jitter, config.flip) == (0.25, (0.5, 0.99), 1e-8, 1 / 8, True)


def test_a_preset_fills_in_what_is_not_given() -> None:
    reference = InversionConfig(preset="reference")
    assert reference.strategy == Stops(PAPER_STOPS, stop_updates=False)
    assert (reference.loss, reference.priors) == ("mean", (TotalVariation(1e-4, "batch"),))
    mixed = InversionConfig(preset="reference", loss="sum", priors=())
    assert (mixed.loss, mixed.priors, mixed.strategy) == ("sum", (), reference.strategy)
    assert InversionConfig(tv_norm="image").priors == (TotalVariation(WEIGHTS["image"], "image"),)
    assert InversionConfig(tv_weight=0.0, l2_weight=0.5).priors == (L2(0.5),)
    assert InversionConfig(tv_weight=0, l2_weight=0).priors == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stops": (), "strategy": Stops(())}, "stops=.*shorthand for a part of strategy, which is given too"),
        ({"tv_norm": "image", "priors": ()}, "tv_norm='image': is shorthand for a part of priors"),
        ({"l2_weight": 0.1, "priors": ()}, "l2_weight=0.1: is shorthand"),
        ({"preset": "paper", "loss": "sum", "priors": (), "strategy": Stops(())}, "all three are given"),
        ({"priors": (Stops(()),)}, "priors: .* is registered as a strategy"),
        ({"strategy": L2(1.0)}, "strategy: .* is registered as a prior"),
        ({"priors": (object(),)}, "its class is not registered"),
        ({"priors": 5}, "must be a tuple of priors"),
        ({"strategy": Stops(((9, 0.3),)), "iterations": 9}, "must come before the last iteration"),
    ],
)
def test_parts_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InversionConfig(**fields)


COUPLED = [
    ({"preset": "reference"}, "loss='mean'.*total_variation:weight=0.0001,norm=batch"),
    ({"tv_norm": "batch"}, "^(?!.*loss).*norm=batch"),  # under the paper's preset
    ({"loss": "mean"}, "loss='mean'"),
]


@pytest.mark.parametrize(("fields", "message"), COUPLED)
def test_what_couples_is_derived_from_the_parts(fields: dict[str, Any], message: str) -> None:
    config = InversionConfig(stops=(), **fields)
    assert config.couples_batch
    with pytest.raises(ValueError, match=message):
        config.require_independent("work")
    assert not InversionConfig(preset="reference", loss="sum", tv_norm="image").couples_batch
    InversionConfig().require_independent("work")


CONFIGS = [
    InversionConfig(),
    InversionConfig(iterations=10, stops=((1, 0.1), (9, 0.25)), preset="reference", seed=3, tv_norm="image"),
    InversionConfig(stops=(), betas=(0.9, 0.999), lr_schedule="cosine", flip=False, tv_weight=1e-3, l2_weight=0.5),
    InversionConfig(priors=(L2(1.0), TotalVariation(), L2(0.5)), strategy=Stops((), stop_updates=False), loss="mean"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config: InversionConfig) -> None:
    text = json.dumps(config.to_dict())
    again = InversionConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_dict() == config.to_dict()


def test_replace_changes_one_field() -> None:
    config = replace(InversionConfig(preset="reference", seed=1), seed=2)
    assert config == InversionConfig(preset="reference", seed=2)


def test_from_dict_fills_in_defaults_and_checks() -> None:
    assert InversionConfig.from_dict({}) == InversionConfig()
    assert InversionConfig.from_dict({"stops": [[5, 1 / 2]], "seed": 2}) == InversionConfig(stops=((5, 0.5),), seed=2)
    with pytest.raises(ValueError, match="lr=-1"):
        InversionConfig.from_dict({"lr": -1})
    old = {"stops": [[5, 0.5]], "preset": "reference", "tv_norm": None, "tv_weight": 0.01, "l2_weight": 0.0}
    expected = InversionConfig(stops=((5, 0.5),), preset="reference", tv_weight=0.01)
    assert InversionConfig.from_dict(old) == expected, "files of before the redesign"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 5, "learning_rate": 0.1}, r"unknown fields \['learning_rate', 'steps'\]; known: .*'iterations'"),
        ([], "a list, must be a JSON object"),
        ({"priors": [{"name": "nothing"}]}, "prior 'nothing': is not registered; known: .*total_variation"),
        ({"priors": [{"name": "gone", "module": "my.priors"}]}, "it came from my.priors: install that package"),
        ({"strategy": {"name": "stops", "version": 9}}, "the recipe has version 9, this is 1"),
        ({"priors": [{"name": "l2", "parameters": {"wait": 1}}]}, "has no parameter wait; known: weight"),
        ({"strategy": {}}, "must have a name"),
    ],
)
def test_from_dict_refuses(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InversionConfig.from_dict(values)
