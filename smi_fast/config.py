"""The recipe: `InversionConfig` holds all that determines an image besides model, label, image id and machine."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from smi_fast import plugins
from smi_fast.checks import Rule, check, check_rules, count, flag, is_finite, one_of, positive, seed
from smi_fast.plugins import Prior, Strategy
from smi_fast.schedule import Stage, StopList

Preset = Literal["paper", "reference"]
LRSchedule = Literal["constant", "cosine"]
Loss = Literal["sum", "mean"]


@dataclass(frozen=True)
class PresetRules:
    """What a preset fills in."""

    stop_updates: bool  # of the strategy
    loss: Loss
    tv_norm: str  # of total variation


PRESETS: Mapping[str, PresetRules] = MappingProxyType(
    {
        "paper": PresetRules(stop_updates=True, loss="sum", tv_norm="pixel"),
        "reference": PresetRules(stop_updates=False, loss="mean", tv_norm="batch"),
    }
)


def help_text(text: str) -> dict[str, str]:
    """Metadata of a field: its help text, which the command line shows too."""
    return {"help": text}


@dataclass(frozen=True)
class InversionConfig:
    """A recipe: with model, label and image id it determines the image, on one machine to the last bit.

    It is one JSON value (`to_dict`), which goes into everything that is made from it. Two parts are plug-ins, see
    `smi_fast.plugins`: the priors, and the strategy that drops patches.

    ``preset``, ``stops``, ``tv_norm``, ``tv_weight`` and ``l2_weight`` are shorthand. They fill in the loss, the priors
    and the strategy where these are not given, and are refused where they are. They are not fields: what they came to
    is read from the parts, such as ``config.strategy.stops``.

    >>> InversionConfig(iterations=400, stops=((50, 0.3),), seed=1)
    >>> InversionConfig(priors=(TotalVariation(1e-3), L2(0.01)), strategy=Stops(()))  # dense

    Raises:
        ValueError: a field breaks the rule that its message names.
    """

    iterations: int = field(default=4000, metadata=help_text("Optimiser steps per image."))
    seed: int = field(
        default=0, metadata=help_text("With an image's id, the key of its random numbers: same seed, same images.")
    )
    lr: float = field(default=0.25, metadata=help_text("Adam's learning rate."))
    lr_schedule: LRSchedule = field(
        default="constant", metadata=help_text("constant, or cosine: down to 0 at the last iteration.")
    )
    betas: tuple[float, float] = field(default=(0.5, 0.99), metadata=help_text("Adam's decay rates."))
    eps: float = field(default=1e-8, metadata=help_text("Adam's epsilon."))
    jitter: float = field(default=1 / 8, metadata=help_text("Largest random shift, as a share of the image's side."))
    flip: bool = field(default=True, metadata=help_text("Mirror an image in half of the iterations."))
    loss: Loss = field(
        default=cast(Any, None),
        metadata=help_text("Cross-entropy of a batch: sum, or mean, which ties images to their batch-mates."),
    )
    priors: tuple[Prior, ...] = field(
        default=cast(Any, None), metadata=help_text("Terms of the loss besides cross-entropy.")
    )
    strategy: Strategy = field(default=cast(Any, None), metadata=help_text("Which patches are dropped, and when."))
    preset: InitVar[Preset | None] = field(
        default=None, metadata=help_text("paper, or reference: what the published code computes.")
    )
    stops: InitVar[StopList | None] = field(
        default=None, metadata=help_text("After so many iterations, drop so much of the kept patches.")
    )
    tv_norm: InitVar[str | None] = field(
        default=None, metadata=help_text("Norm of total variation: pixel, image or batch.")
    )
    tv_weight: InitVar[float | None] = field(default=None, metadata=help_text("Weight of total variation; 0 for none."))
    l2_weight: InitVar[float | None] = field(
        default=None, metadata=help_text("Weight of the 2-norm of an image; 0 for none.")
    )

    def __post_init__(
        self,
        preset: Preset | None,
        stops: StopList | None,
        tv_norm: str | None,
        tv_weight: float | None,
        l2_weight: float | None,
    ) -> None:
        if preset is not None:
            check("preset", preset, one_of(preset, tuple(PRESETS)))
        given = {"stops": stops, "tv_norm": tv_norm, "tv_weight": tv_weight, "l2_weight": l2_weight}
        _refuse_both(self, preset, given)
        rules = PRESETS[preset or "paper"]
        if self.loss is None:
            _set(self, "loss", rules.loss)
        if self.strategy is None:
            parameters = {} if stops is None else {"stops": stops}
            _set(self, "strategy", _stops(parameters | {"stop_updates": rules.stop_updates}))
        if self.priors is None:
            _set(self, "priors", _priors(rules.tv_norm if tv_norm is None else tv_norm, tv_weight, l2_weight))
        for name in ("priors", "betas"):
            if isinstance(getattr(self, name), list):
                _set(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def coupling(self) -> tuple[str, ...]:
        """The parts that make an image depend on its batch-mates, in words; empty where the images are independent."""
        found = ["loss='mean', a mean over the batch"] if self.loss == "mean" else []
        coupled = [prior for prior in self.priors if getattr(prior, "couples_batch", False)]
        return (*found, *(f"prior {plugins.describe(prior)}, which couples the images of a batch" for prior in coupled))

    @property
    def couples_batch(self) -> bool:
        """Does an image depend on its batch-mates?"""
        return bool(self.coupling)

    def require_independent(self, what: str) -> None:
        """Refuse work that only makes sense where images do not depend on their batch-mates.

        Raises:
            ValueError: naming ``what``, and the parts that couple.
        """
        if self.couples_batch:
            raise ValueError(f"{what}: images depend on their batch-mates here, because of {'; '.join(self.coupling)}")

    def stages(self, patches: int) -> tuple[Stage, ...]:
        """The stages on a grid of ``patches`` patches; raises ``ValueError`` where the strategy does not fit it."""
        return self.strategy.stages(patches, self.iterations)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, and enough to make the same images again with `from_dict`."""
        values: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        values["betas"] = list(self.betas)
        values["priors"] = [plugins.to_json(prior) for prior in self.priors]
        values["strategy"] = plugins.to_json(self.strategy)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "InversionConfig":
        """The inverse of `to_dict`; also takes shorthand, as older files have it.

        Raises:
            ValueError: an unknown field, a plug-in that is not there, or a value that breaks a rule.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: a {type(values).__name__}, must be a JSON object of fields")
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"recipe: unknown fields {sorted(unknown)}; known: {sorted(cls.__dataclass_fields__)}")
        parts = dict(values)
        if parts.get("priors") is not None:
            parts["priors"] = tuple(plugins.from_json("prior", entry) for entry in parts["priors"])
        if parts.get("strategy") is not None:
            parts["strategy"] = plugins.from_json("strategy", parts["strategy"])
        return cls(**parts)


def _set(config: InversionConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _stops(parameters: dict[str, Any]) -> Strategy:
    factory = plugins.lookup("strategy", "stops").factory
    made: Strategy = factory(**parameters)
    return made


def _priors(tv_norm: str, tv_weight: float | None, l2_weight: float | None) -> tuple[Prior, ...]:
    """The priors that the shorthand names, those of weight 0 left out."""
    norms = plugins.lookup("prior", "total_variation").factory
    check("tv_norm", tv_norm, one_of(tv_norm, ("pixel", "image", "batch")))
    for name, weight in (("tv_weight", tv_weight), ("l2_weight", l2_weight)):
        holds = weight is None or (is_finite(weight) and weight >= 0)
        check(name, weight, (holds, "must be finite and at least 0"))
    priors: list[Prior] = []
    if tv_weight != 0:
        priors.append(norms(tv_weight, tv_norm))
    if l2_weight:
        priors.append(plugins.lookup("prior", "l2").factory(l2_weight))
    return tuple(priors)


def _refuse_both(config: InversionConfig, preset: Preset | None, given: Mapping[str, Any]) -> None:
    """Refuse shorthand for a part that is given."""
    part_of = {"stops": "strategy", "tv_norm": "priors", "tv_weight": "priors", "l2_weight": "priors"}
    for name, value in given.items():
        part = part_of[name]
        if value is not None and getattr(config, part) is not None:
            raise ValueError(
                f"{name}={value!r}: is shorthand for a part of {part}, which is given too; give one of them"
            )
    filled = (config.loss, config.priors, config.strategy)
    if preset is not None and all(part is not None for part in filled):
        raise ValueError(f"preset={preset!r}: fills in loss, priors and strategy, and all three are given")


def _check(c: InversionConfig) -> None:
    """Each field against its rule; the first that breaks one is named."""
    betas = isinstance(c.betas, tuple) and len(c.betas) == 2 and all(is_finite(b) and 0 <= b < 1 for b in c.betas)
    jitter = is_finite(c.jitter) and 0 <= c.jitter <= 0.5
    rules: dict[str, Rule] = {
        "iterations": count(c.iterations),
        "seed": seed(c.seed),
        "lr": positive(c.lr),
        "lr_schedule": one_of(c.lr_schedule, get_args(LRSchedule)),
        "betas": (betas, "must be two numbers in [0, 1)"),
        "eps": positive(c.eps),
        "jitter": (jitter, "must lie in 0..0.5, a share of the image's side"),
        "flip": flag(c.flip),
        "loss": one_of(c.loss, get_args(Loss)),
    }
    rules["priors"] = (isinstance(c.priors, tuple), "must be a tuple of priors")
    check_rules(c, rules)
    for prior in c.priors:
        _check_kind("priors", prior, "prior")
    _check_kind("strategy", c.strategy, "strategy")
    early = getattr(c.strategy, "check", None)
    if early is not None:
        early(c.iterations)


def _check_kind(name: str, part: object, kind: str) -> None:
    known = plugins.registered(part)
    if known.kind != kind:
        raise ValueError(f"{name}: {part!r} is registered as a {known.kind}")
    plugins.to_json(part)  # refuses what could not be recorded
