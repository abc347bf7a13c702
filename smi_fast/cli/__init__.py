"""The command line, ``smi-fast``."""

import sys

import typer

from smi_fast.cli.distill import distill
from smi_fast.cli.doctor import doctor
from smi_fast.cli.invert import invert
from smi_fast.cli.list import list_names
from smi_fast.cli.plan import plan
from smi_fast.cli.quantize import quantize
from smi_fast.cli.show import show
from smi_fast.cli.tune import tune
from smi_fast.storage.environment import __version__

app = typer.Typer(
    name="smi-fast",
    help="Synthesise images that a frozen Vision Transformer recognises (Sparse Model Inversion).",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (invert, quantize, distill, show, plan, tune, doctor):
    app.command()(command)
app.command("list")(list_names)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smi-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line; what a user can mend ends as one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, MemoryError) as error:
        print(f"smi-fast: {_with_flags(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _with_flags(message: str) -> str:
    """Name the flag where a message begins with an argument: ``tv_weight=-1: ...`` to ``--tv-weight -1: ...``."""
    name, equals, rest = message.partition("=")
    flag = f"--{name.removeprefix('--').replace('_', '-')}"
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {}).values()
    known = {option for each in commands for parameter in each.params for option in parameter.opts}
    return f"{flag} {rest}" if equals and flag in known else message
