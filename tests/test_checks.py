"""Rules of configurations: what they accept, and what the message says."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from smi_fast import checks

ODD = (None, "1", "", b"1", [1], {}, object(), torch.ones(2), math.nan, math.inf, -math.inf, True, False)
KEPT = {
    "count": (1, 7, 2**80),
    "seed": (0, 2**63 - 1),
    "positive": (1, 0.5, 1e-300),
    "not_negative": (0, 0.0, 3, 1e300),
}
BROKEN = {
    "count": (0, -1, 1.0),
    "seed": (-1, 2**63, 0.0),
    "positive": (0, 0.0, -1e-300, 10**400),
    "not_negative": (-1, -1e-300, 10**400),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_rule_keeps_to_its_bounds(name: str) -> None:
    rule = getattr(checks, name)
    assert [value for value in KEPT[name] if not rule(value)[0]] == []
    assert [value for value in (*BROKEN[name], *ODD) if rule(value)[0] is not False] == []


def test_flags_and_names() -> None:
    assert checks.flag(True)[0]
    assert checks.flag(False)[0]
    assert not any(checks.flag(value)[0] for value in (0, 1, None, "True"))
    assert checks.one_of("a", ("a", "b")) == (True, "must be one of 'a', 'b'")
    assert not any(checks.one_of(value, ("a", "b"))[0] for value in (*ODD, "A", "ab"))


def test_the_first_broken_rule_is_named() -> None:
    @dataclass
    class Fields:
        first: Any = 1
        second: Any = "no"
        third: Any = -1

    rules = {name: checks.count(getattr(Fields(), name)) for name in ("first", "second", "third")}
    with pytest.raises(ValueError, match=r"^second='no': must be an integer of at least 1$"):
        checks.check_rules(Fields(), rules)
    checks.check_rules(Fields(), {"first": rules["first"]})
