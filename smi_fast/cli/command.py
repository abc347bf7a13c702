"""Commands whose options are made from the fields of dataclasses, so that a field's help text is written once.

A command takes a few such groups as arguments:

    @command
    def invert(out: Output, recipe: RecipeOptions, labels: Annotated[str, typer.Option(...)] = "all") -> None: ...

Each field of a group becomes an option: name, type and default are the field's, the help text is ``metadata["help"]``,
and ``metadata["flags"]`` names the flags where they are not the field's name. The group's ``PANEL`` stands above
its options in ``--help``.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a function a signature that typer can read; the options of its groups come in the order of the groups."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += [_option(part, hints[name]) for part in fields(hints[name])]
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=_with_default(hints[name]), kind=kind))
    # those that must be given first: python wants it so, and so do readers of --help
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

    @functools.wraps(function)
    def run(**values: Any) -> None:
        made = {}
        for name, group in groups.items():
            made[name] = group(**{part.name: values.pop(part.name) for part in fields(group)})
        function(**made, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


def options_of(source: Any, names: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Fields for `make_dataclass` that are those of another dataclass, with a plain string for a choice of names."""
    hints = get_type_hints(source)
    made = []
    for name in names:
        part = source.__dataclass_fields__[name]
        kind = str if get_origin(hints[name]) is Literal else hints[name]
        made.append((name, kind, field(default=part.default, metadata=part.metadata)))
    return made


def _option(part: Field[Any], group: Any) -> inspect.Parameter:
    """The option of one field."""
    kind = get_type_hints(group)[part.name]
    flags = part.metadata.get("flags", ())
    info = typer.Option(*flags, help=part.metadata["help"], rich_help_panel=group.PANEL)
    _move_default(info)
    default = inspect.Parameter.empty if part.default is MISSING else part.default
    return inspect.Parameter(
        part.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _with_default(annotation: Any) -> Any:
    """The annotation of a plain option, after `_move_default`."""
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, ParameterInfo):
            _move_default(extra)
    return annotation


def _move_default(info: ParameterInfo) -> None:
    """Let typer show a default that a help text ends with, ``[default: ...]``: it takes brackets for mark-up."""
    text, mark, rest = (info.help or "").rpartition(" [default: ")
    if mark:
        info.help, info.show_default = text, rest.removesuffix("]")
