"""The recipe on the command line: an option per field of `InversionConfig`, and recipes that were saved."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

from smi_fast import plugins
from smi_fast.config import InversionConfig, help_text
from smi_fast.images import SparseImages

PARTS = ("priors", "strategy", "stops")  # with flags of their own


class Saved(NamedTuple):
    """A recipe from a file, with what else the file knows; None or empty where it does not."""

    config: InversionConfig
    model: str | None = None
    sha256: str | None = None  # of the model's weights
    image_size: tuple[int, int] | None = None
    labels: tuple[int, ...] = ()
    image_ids: tuple[int, ...] = ()
    dtype: str | None = None
    impl: str | None = None
    batch_size: tuple[int, ...] | None = None


def load_recipe(path: Path) -> Saved:
    """Read the ``report.json`` of a run, an ``images.safetensors``, or a JSON file of a recipe alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file: it holds no recipe, or one that cannot be made here.
    """
    if path.suffix == ".safetensors":
        images = SparseImages.load(path)
        origin = images.provenance
        config = _config(path, origin.config)
        size = (images.grid.height, images.grid.width)
        labels, ids = tuple(images.labels.tolist()), tuple(images.image_ids.tolist())
        return Saved(config, origin.model_name, origin.model_sha256, size, labels, ids)
    if not path.is_file():
        raise FileNotFoundError(f"--recipe {str(path)!r}: no such file")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--recipe {str(path)!r}: is not JSON: {error}") from None
    if not isinstance(content, dict) or "recipe" not in content:
        return Saved(_config(path, content))
    config, model = _config(path, content["recipe"]), content.get("model", {})
    return Saved(
        config,
        model.get("name"),
        model.get("sha256"),
        tuple(content["image_size"]) if "image_size" in content else None,
        tuple(content.get("labels", ())),
        tuple(content.get("image_ids", ())),
        content.get("dtype"),
        content.get("impl"),
        tuple(content["batch_size"]) if "batch_size" in content else None,
    )


def _config(path: Path, values: Any) -> InversionConfig:
    try:
        return InversionConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--recipe {str(path)!r}: {error}") from None


def _scalar_fields(names: Iterable[str]) -> list[Any]:
    """An optional field for each of these fields of the recipe, None where it is not given."""
    hints = get_type_hints(InversionConfig)
    made = []
    for name in names:
        kind = hints[name].type if isinstance(hints[name], InitVar) else hints[name]
        part = InversionConfig.__dataclass_fields__[name]
        shown = part.metadata["help"] + (f" [default: {_shown(part.default)}]" if part.default is not None else "")
        made.append((name, _plain(kind) | None, field(default=None, metadata=help_text(shown))))
    return made


def _plain(kind: Any) -> Any:
    """What the command line reads for a type: ``str`` for names, the type itself else."""
    options = [option for option in get_args(kind) if option is not type(None)]
    if options and all(isinstance(option, str) for option in options):
        return str
    if type(None) in get_args(kind):
        return _plain(options[0])
    return kind


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class PartOptions:
    """The options of the recipe's parts, and the recipe from a file."""

    PANEL: ClassVar[str] = "Recipe"
    SCALARS: ClassVar[tuple[str, ...]] = ()

    stop: list[str] | None = field(
        default=None,
        metadata=help_text(
            "ITERATION:RATIO, repeated: after ITERATION steps drop RATIO of the kept patches. [default: the paper's]"
        ),
    )
    dense: bool = field(
        default=False, metadata={"help": "No stops: every patch is inverted to the end.", "flags": ("--dense",)}
    )
    prior: list[str] | None = field(
        default=None,
        metadata=help_text(
            "NAME:key=value,..., repeated: these priors, in place of the preset's; see `smi-fast list`."
        ),
    )
    strategy: str | None = field(
        default=None, metadata=help_text("NAME:key=value,...: this strategy, in place of --stop.")
    )
    plugin: list[str] | None = field(
        default=None, metadata=help_text("Python module that registers priors or strategies, repeated.")
    )
    recipe: Path | None = field(
        default=None,
        metadata=help_text(
            "report.json, images.safetensors, or a recipe's .json: what to make again. Other options change it."
        ),
    )

    def load(self, **fixed: Any) -> Saved:
        """The recipe that the options describe; nothing but files and plug-ins is loaded.

        Args:
            fixed: fields that are not options of the command, such as ``seed=0``.

        Raises:
            ValueError: an option breaks a rule, or two exclude each other.
            FileNotFoundError: no such recipe.
        """
        for module in self.plugin or ():
            plugins.load_plugin(module)
        given = {name: getattr(self, name) for name in self.SCALARS if getattr(self, name) is not None}
        given |= fixed | self._parts()
        if self.recipe is None:
            return Saved(InversionConfig(**_with_short_stops(given)))
        saved = load_recipe(self.recipe)
        return saved._replace(config=_changed(saved.config, given))

    def _parts(self) -> dict[str, Any]:
        """Priors, strategy and stops."""
        parts: dict[str, Any] = {}
        if self.prior:
            parts["priors"] = tuple(plugins.parse("prior", text) for text in self.prior)
        if self.strategy is not None:
            parts["strategy"] = plugins.parse("strategy", self.strategy)
        stops = parse_stops(self.stop, self.dense)
        if stops is not None:
            parts["stops"] = stops
        return parts


_SCALARS = tuple(name for name in InversionConfig.__dataclass_fields__ if name not in PARTS)
_Scalars = make_dataclass("_Scalars", _scalar_fields(_SCALARS), frozen=True)
_Iterations = make_dataclass("_Iterations", _scalar_fields(["iterations"]), frozen=True)


@dataclass(frozen=True)
class RecipeOptions(PartOptions, _Scalars):  # type: ignore[misc, valid-type]  # made from the recipe's fields
    """All options that a recipe is made from."""

    SCALARS: ClassVar[tuple[str, ...]] = _SCALARS


@dataclass(frozen=True)
class InversionOptions(PartOptions, _Iterations):  # type: ignore[misc, valid-type]  # made from the recipe's fields
    """Those of a command whose main job is another one."""

    PANEL: ClassVar[str] = "Inversion (without --images)"
    SCALARS: ClassVar[tuple[str, ...]] = ("iterations",)


def _changed(config: InversionConfig, given: Mapping[str, Any]) -> InversionConfig:
    """A saved recipe with some of its parts replaced; shorthand replaces the part it stands for."""
    parts = {name: getattr(config, name) for name in ("loss", "priors", "strategy")}
    if {"tv_norm", "tv_weight", "l2_weight"} & set(given):
        del parts["priors"]
    if "stops" in given:
        stopping = {"stops": given["stops"], "stop_updates": config.strategy.stop_updates}
        given = {name: value for name, value in given.items() if name != "stops"}
        parts["strategy"] = plugins.create("strategy", "stops", stopping)
    scalars = {name: getattr(config, name) for name in ("iterations", "seed", "lr", "lr_schedule", "betas", "eps")}
    scalars |= {name: getattr(config, name) for name in ("jitter", "flip")}
    return InversionConfig(**(scalars | parts | dict(given)))


def _with_short_stops(given: dict[str, Any]) -> dict[str, Any]:
    """Say what to do where a run is too short for the paper's stops."""
    if "stops" not in given and "strategy" not in given:
        last = plugins.create("strategy", "stops", {}).stops[-1][0]
        iterations = given.get("iterations", last + 1)
        if iterations <= last:
            raise ValueError(
                f"--iterations {iterations}: the default stops need more than {last}; give --stop or --dense"
            )
    return given


def parse_stops(texts: list[str] | None, dense: bool) -> tuple[tuple[int, float], ...] | None:
    """``["50:0.3"]`` to ``((50, 0.3),)``; no stop with ``dense``, None where neither is given.

    Raises:
        ValueError: not of the form ITERATION:RATIO, or stops together with ``dense``.
    """
    if dense:
        if texts:
            raise ValueError("--dense and --stop exclude each other: --dense means no stop at all")
        return ()
    if not texts:
        return None
    stops = []
    for text in texts:
        iteration, colon, ratio = text.partition(":")
        try:
            if not colon:
                raise ValueError
            stops.append((int(iteration), float(ratio)))
        except ValueError:
            raise ValueError(f"--stop {text!r}: must be ITERATION:RATIO, such as 50:0.3") from None
    return tuple(stops)
