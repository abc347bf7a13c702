"""Plug-ins: priors and strategies, by name.

A plug-in is a frozen dataclass whose fields are its parameters, all of them JSON-able. It is registered under a name,
so that a recipe can say what it was made with, and make it again:

    @register("prior", "contrast")
    @dataclass(frozen=True)
    class Contrast:
        weight: float = 1.0
        ...

Those of other packages are found through the entry-point group ``smi_fast.plugins`` (its value names a module), or
loaded by module name with `load_plugin`, on the command line ``--plugin pkg.module``. `Prior` and `Strategy` say what
each kind must offer.
"""

import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from torch import Tensor

from smi_fast.schedule import Stage

Kind = Literal["prior", "strategy"]
Class = TypeVar("Class", bound=type)
GROUP = "smi_fast.plugins"
OWN = ("smi_fast.method.priors", "smi_fast.method.strategies")  # imported when a name is looked up first


class Prior(Protocol):
    """A term of the loss besides cross-entropy; see ``smi_fast/method/view.py`` for what it may look at.

    Two attributes are optional. ``needs`` (`smi_fast.model.spec.Needs`) names the block outputs and attention maps that
    the prior reads; without it there are none. ``couples_batch`` is True where the value of one image depends on its
    batch-mates; without it, it does not.
    """

    @property
    def weight(self) -> float:
        """What the value is multiplied by; at least 0."""
        ...

    def __call__(self, view: Any) -> Tensor:
        """The value of each image, ``[B]``, differentiable; ``view`` is a `smi_fast.method.view.View`."""
        ...


class Strategy(Protocol):
    """Which patches go on, and when.

    A method ``check(iterations)`` is optional: it raises ``ValueError`` where the parameters do not fit a run of so
    many iterations, which is then found before a model is loaded.
    """

    @property
    def stop_updates(self) -> bool:
        """True: a stopped patch leaves priors and optimiser too. False: only the model no longer sees it."""
        ...

    def stages(self, patches: int, iterations: int) -> tuple[Stage, ...]:
        """The stages of a run, each with a constant number of kept patches, all of them in the first.

        Raises:
            ValueError: the parameters do not fit the number of patches or iterations.
        """
        ...

    def still_iterations(self, iterations: int) -> frozenset[int]:
        """The iterations, counted from 0, that run without jitter and flip."""
        ...

    def select(self, stop: Any, count: int) -> Tensor:
        """What is kept at the end of a stage.

        Args:
            stop: a `smi_fast.method.view.StopView`.
            count: ``K'``, the kept patches of the next stage.

        Returns:
            ``[B, K']`` int64, ascending: the positions in ``stop.keep`` of the patches that go on.
        """
        ...


class Registered(NamedTuple):
    """A plug-in's class with what it is registered as."""

    kind: Kind
    name: str
    version: int
    factory: Any


_by_name: dict[tuple[Kind, str], Registered] = {}
_by_class: dict[type, Registered] = {}


def register(kind: Kind, name: str, version: int = 1) -> Callable[[Class], Class]:
    """Register a frozen dataclass under a name; a class decorator.

    Args:
        kind: "prior" or "strategy".
        name: lower case, digits and underscores.
        version: counted up when the same parameters come to give other images, so that old recipes are not repeated
            wrongly.

    Raises:
        ValueError: an unknown kind, a bad name, a name that another class has, or a class that is no frozen dataclass.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: must be one of {get_args(Kind)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}: must be lower case letters, digits and underscores")

    def add(cls: Class) -> Class:
        if not (is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise ValueError(f"{cls.__name__}: a plug-in must be a frozen dataclass; put @register above @dataclass")
        old = _by_name.get((kind, name))
        if old is not None and _path(old.factory) != _path(cls):
            raise ValueError(f"{kind} {name!r}: is registered already, by {_path(old.factory)}")
        _by_name[kind, name] = _by_class[cls] = Registered(kind, name, version, cls)
        return cls

    return add


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _find_all() -> None:
    """Import our own plug-ins, and those that installed packages announce."""
    for module in OWN:
        importlib.import_module(module)
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # a broken package must not take everything else down
            warnings.warn(f"plug-in {point.name!r} ({point.value}) cannot be loaded: {error}", stacklevel=3)


def load_plugin(module: str) -> None:
    """Import a module that registers plug-ins.

    Raises:
        ValueError: it cannot be imported; the reason is given.
    """
    _find_all()
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"plugin={module!r}: cannot be imported: {type(error).__name__}: {error}") from error


def names(kind: Kind) -> list[str]:
    """All registered names of a kind, sorted."""
    _find_all()
    return sorted(name for of, name in _by_name if of == kind)


def lookup(kind: Kind, name: str) -> Registered:
    """The plug-in of a name.

    Raises:
        ValueError: there is none; the known names are listed.
    """
    _find_all()
    found = _by_name.get((kind, name))
    if found is None:
        raise ValueError(f"{kind} {name!r}: is not registered; known: {', '.join(names(kind))}")
    return found


def registered(plugin: object) -> Registered:
    """What the class of an object is registered as.

    Raises:
        ValueError: it is not registered.
    """
    _find_all()
    found = _by_class.get(type(plugin))
    if found is None:
        raise ValueError(
            f"{plugin!r}: its class is not registered, so no recipe could name it; decorate it with "
            '@smi_fast.plugins.register("prior" or "strategy", NAME)'
        )
    return found


def create(kind: Kind, name: str, parameters: Mapping[str, Any]) -> Any:
    """Make a plug-in from its parameters; those left out take their defaults.

    Raises:
        ValueError: an unknown name, a parameter that the plug-in does not have or lacks, or a value that it refuses.
    """
    factory = lookup(kind, name).factory
    known = [field.name for field in fields(factory) if field.init]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"{kind} {name!r}: has no parameter {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        return factory(**parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error


def to_json(plugin: object) -> dict[str, Any]:
    """Name, version and parameters; for a plug-in of another package also the module that has it.

    Raises:
        ValueError: the class is not registered, or a parameter is not JSON-able.
    """
    known = registered(plugin)
    parameters = {field.name: getattr(plugin, field.name) for field in fields(known.factory) if field.init}
    try:
        parameters = json.loads(json.dumps(parameters, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{known.kind} {known.name!r}: its parameters must be JSON-able: {error}") from error
    entry = {"name": known.name, "version": known.version, "parameters": parameters}
    module = known.factory.__module__
    return entry if module.startswith("smi_fast.") else entry | {"module": module}


def from_json(kind: Kind, entry: Mapping[str, Any]) -> Any:
    """The inverse of `to_json`.

    Raises:
        ValueError: the plug-in is missing (the module it came from is named), is of another version, or refuses.
    """
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"{kind}: {entry!r} must have a name, a version and parameters")
    try:
        known = lookup(kind, entry["name"])
    except ValueError as error:
        origin = entry.get("module")
        hint = f"; it came from {origin}: install that package, or load it with --plugin {origin}" if origin else ""
        raise ValueError(f"{error}{hint}") from None
    if entry.get("version", known.version) != known.version:
        raise ValueError(f"{kind} {known.name!r}: the recipe has version {entry['version']}, this is {known.version}")
    return create(kind, known.name, entry.get("parameters", {}))


def parse(kind: Kind, text: str) -> Any:
    """``NAME`` or ``NAME:key=value,...`` to a plug-in; values are JSON, or plain text.

    >>> parse("prior", "total_variation:weight=1e-3,norm=image")
    TotalVariation(weight=0.001, norm='image')

    Raises:
        ValueError: naming the text: it has another form, or `create` refuses it.
    """
    name, _, rest = text.partition(":")
    try:
        pairs = [part.partition("=") for part in _split(rest)]
        if any(not equals or not key.strip() for key, equals, _ in pairs):
            raise ValueError("must be NAME or NAME:key=value,...")
        parameters = {key.strip(): _value(value.strip()) for key, _, value in pairs}
        return create(kind, name.strip(), parameters)
    except ValueError as error:
        raise ValueError(f"--{kind} {text!r}: {error}") from None


def describe(plugin: object) -> str:
    """The text form that `parse` reads."""
    entry = to_json(plugin)
    values = [f"{key}={_text(value)}" for key, value in entry["parameters"].items()]
    return entry["name"] + (":" + ",".join(values) if values else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
