"""The registry: names, texts and JSON, and what is refused."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fast import plugins
from smi_fast.method.priors import L2, TotalVariation
from smi_fast.method.strategies import Stops

WEIGHTS = st.floats(0, 1e6, allow_nan=False)
RATIOS = st.floats(0.01, 0.99)
STOPS = st.dictionaries(st.integers(1, 50), RATIOS, max_size=4).map(lambda found: Stops(tuple(sorted(found.items()))))
PLUGINS = st.one_of(
    st.builds(L2, WEIGHTS), st.builds(TotalVariation, WEIGHTS, st.sampled_from(["pixel", "image", "batch"])), STOPS
)


@given(PLUGINS)
def test_json_and_text_come_back(plugin: Any) -> None:
    kind = plugins.registered(plugin).kind
    entry = json.loads(json.dumps(plugins.to_json(plugin)))
    assert set(entry) == {"name", "version", "parameters"}, "our own plug-ins need no module"
    assert plugins.from_json(kind, entry) == plugin
    assert plugins.parse(kind, plugins.describe(plugin)) == plugin


def test_every_plugin_of_ours_has_defaults_and_comes_back() -> None:
    assert plugins.names("prior") == sorted({*plugins.names("prior"), "l2", "total_variation"})
    assert "stops" in plugins.names("strategy")
    for kind in ("prior", "strategy"):
        for name in plugins.names(kind):  # type: ignore[arg-type]
            if plugins.lookup(kind, name).factory.__module__.startswith("smi_fast."):  # type: ignore[arg-type]
                made = plugins.create(kind, name, {})  # type: ignore[arg-type]
                assert plugins.from_json(kind, plugins.to_json(made)) == made  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("l2", L2()),
        ("l2:weight=1e-3", L2(1e-3)),
        ("total_variation: weight = 2 , norm = image", TotalVariation(2, "image")),
    ],
)
def test_parse(text: str, expected: Any) -> None:
    assert plugins.parse("prior", text) == expected


def test_brackets_hold_commas_together() -> None:
    assert plugins.parse("strategy", "stops:stops=[[5,0.5],[6,0.25]],stop_updates=false") == Stops(
        ((5, 0.5), (6, 0.25)), stop_updates=False
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "--prior 'nothing': prior 'nothing': is not registered; known: "),
        ("", "is not registered; known"),
        ("l2:weight", "must be NAME or NAME:key=value"),
        ("l2:=3", "must be NAME or NAME:key=value"),
        ("l2:weight=-1", "weight=-1: must be finite and at least 0"),
        ("l2:weight=heavy", "weight='heavy': must be finite"),
        ("l2:wait=1", "has no parameter wait; known: weight"),
        ("total_variation:norm=l7", "norm='l7': must be one of"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugins.parse("prior", text)


def test_register_refuses() -> None:
    @dataclass(frozen=True)
    class Other:
        weight: float = 1.0

    with pytest.raises(ValueError, match=r"prior 'l2': is registered already, by smi_fast\.method\.priors\.l2\.L2"):
        plugins.register("prior", "l2")(Other)
    with pytest.raises(ValueError, match="name='No Name': must be lower case"):
        plugins.register("prior", "No Name")
    with pytest.raises(ValueError, match="kind='loss'"):
        plugins.register("loss", "x")  # type: ignore[arg-type]

    class Plain:
        pass

    with pytest.raises(ValueError, match="must be a frozen dataclass"):
        plugins.register("prior", "test_plain")(Plain)
    with pytest.raises(ValueError, match=r"plugin='no\.such': cannot be imported"):
        plugins.load_plugin("no.such")


def test_parameters_must_be_json() -> None:
    @plugins.register("prior", "test_tensor")
    @dataclass(frozen=True)
    class Tensors:
        weight: Any = None

    with pytest.raises(ValueError, match="prior 'test_tensor': its parameters must be JSON-able"):
        plugins.to_json(Tensors(torch.zeros(1)))
    with pytest.raises(ValueError, match="must be JSON-able"):
        plugins.to_json(Tensors(float("nan")))
