"""Rules that the fields of a configuration must keep, and the `ValueError` that names the first one broken.

    check_rules(config, {"lr": positive(config.lr), "steps": count(config.steps)})
    # ValueError: lr=-1.0: must be a positive number

A rule is a pair: does the value keep it, and the rule in words. No rule raises, whatever the type of the value.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

Rule = tuple[bool, str]
MOST_SEED = 2**63 - 1


def is_int(value: Any) -> bool:
    """True for an ``int``, False for a ``bool`` and everything else."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for an ``int`` or ``float`` that is a finite float, False for a ``bool`` and everything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def count(value: Any) -> Rule:
    """An integer of at least 1."""
    return is_int(value) and value >= 1, "must be an integer of at least 1"


def seed(value: Any) -> Rule:
    """An integer that a random stream takes as its key: 63 bits."""
    return is_int(value) and 0 <= value <= MOST_SEED, "must be an integer in 0..2**63-1"


def positive(value: Any) -> Rule:
    """A finite number above 0."""
    return is_finite(value) and value > 0, "must be a positive number"


def not_negative(value: Any) -> Rule:
    """A finite number of at least 0."""
    return is_finite(value) and value >= 0, "must be finite and at least 0"


def flag(value: Any) -> Rule:
    """True or False, and not 0 or 1."""
    return isinstance(value, bool), "must be True or False"


def one_of(value: Any, names: Collection[str]) -> Rule:
    """One of the strings in ``names``."""
    return isinstance(value, str) and value in names, f"must be one of {', '.join(map(repr, names))}"


def check(name: str, value: Any, rule: Rule) -> None:
    """Hold one value to a rule.

    Raises:
        ValueError: the rule is broken; names ``name``, ``value`` and the rule.
    """
    holds, words = rule
    if not holds:
        raise ValueError(f"{name}={value!r}: {words}")


def check_rules(fields: object, rules: Mapping[str, Rule]) -> None:
    """Hold attributes of an object to their rules, in order.

    Args:
        fields: the object, usually a frozen dataclass.
        rules: by attribute name.

    Raises:
        ValueError: for the first broken rule; names the field, its value and the rule.
    """
    for name, rule in rules.items():
        check(name, getattr(fields, name), rule)
