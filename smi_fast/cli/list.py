"""``smi-fast list``: what names there are."""

import inspect
from typing import Annotated, get_args

import timm
import typer
from rich.console import Console
from rich.table import Table

from smi_fast import plugins
from smi_fast.checks import check, one_of
from smi_fast.cli.command import command
from smi_fast.model.load import DEMO

WHAT = {"priors": "prior", "strategies": "strategy", "models": None}
HOW_MANY = 40  # model names, unless a pattern is given


@command
def list_names(
    what: Annotated[str, typer.Argument(help="priors, strategies or models.")],
    pattern: Annotated[str | None, typer.Option(help="Of model names, such as 'deit*'.")] = None,
    plugin: Annotated[list[str] | None, typer.Option(help="Python module that registers some, repeated.")] = None,
) -> None:
    """List the priors and strategies that are there, with their parameters, or the models that timm has."""
    check("what", what, one_of(what, tuple(WHAT)))
    for module in plugin or ():
        plugins.load_plugin(module)
    if what == "models":
        _models(pattern)
        return
    kind = WHAT[what]
    assert kind in get_args(plugins.Kind)
    table = Table("name", "parameters and defaults", "what it is", "from", title=what)
    for name in plugins.names(kind):  # type: ignore[arg-type]  # asserted above
        factory = plugins.lookup(kind, name).factory  # type: ignore[arg-type]
        first = (inspect.getdoc(factory) or "").partition("\n")[0]
        table.add_row(name, _parameters(factory), first, factory.__module__.partition(".")[0])
    Console().print(table)


def _parameters(factory: type) -> str:
    """A line each, ``name=default``."""
    lines = []
    for name, parameter in inspect.signature(factory).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        lines.append(name if required else f"{name}={parameter.default!r}")
    return "\n".join(lines)


def _models(pattern: str | None) -> None:
    """timm's names; which of them run here is only known once one is built, so all Vision Transformers are shown."""
    names = timm.list_models(pattern or ["vit_*", "deit*"])
    shown = [DEMO, *names] if pattern is None else names
    for name in shown if pattern else shown[:HOW_MANY]:
        typer.echo(name)
    rest = len(shown) - HOW_MANY
    if pattern is None and rest > 0:
        typer.echo(f"... and {rest} more; narrow them down with --pattern 'deit*'")
    if not shown:
        raise ValueError(f"--pattern {pattern!r}: timm {timm.__version__} has no model of such a name")
