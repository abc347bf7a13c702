"""``smi-fast tune``: measure, and choose the batch of each stage."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from smi_fast.checks import check, count
from smi_fast.cli.command import command
from smi_fast.cli.options import ModelOptions, RunOptions
from smi_fast.cli.recipe import RecipeOptions
from smi_fast.engine.timing import StageTimer
from smi_fast.storage.environment import device_name
from smi_fast.tuning.measure import tune as measure
from smi_fast.tuning.settings import DEFAULT_BATCH, Target, decide
from smi_fast.tuning.store import Tuned, all_tuned, save


@command
def tune(
    model: ModelOptions,
    recipe: RecipeOptions,
    machine: RunOptions,
    most: Annotated[int, typer.Option(help="The largest batch to try.")] = 512,
    rounds: Annotated[int, typer.Option(help="Timings of each batch, of which the median counts.")] = 3,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Measure which batch is best for each stage on this machine; `invert` and `plan` use it from then on."""
    saved = recipe.load()
    for name, value in (("--most", most), ("--rounds", rounds)):
        check(name, value, count(value))
    saved.config.require_independent("tune")
    check("--batch-size", machine.batch_size, (machine.batch_size == "auto", "is what this command finds out"))
    dtype, device = machine.target()
    all_tuned()  # a file that cannot be read is refused before the work, not after it
    vit = model.load(dtype, device, saved)
    console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
    settings = decide(Target.of(vit), saved.config, batch_size=1, impl=machine.chosen_impl)
    for note in settings.notes:
        console.print(note)
    timer = StageTimer(vit, saved.config, settings.impl)
    tuned = measure(timer, most=most, rounds=rounds, say=console.print)
    Console().print(_table(tuned, f"{vit.info.name}, {tuned.key.precision}, {tuned.key.impl}, {device_name(device)}"))
    typer.echo(f"chosen: {', '.join(map(str, tuned.batches))}")
    typer.echo(f"predicted: {tuned.gain:.2f} times as fast as a batch of {DEFAULT_BATCH}, or the largest below it")
    for tokens, name in tuned.attention.items():
        typer.echo(f"attention of {tokens} tokens: {name}")
    typer.echo(f"kept in {save(tuned)}")


def _table(tuned: Tuned, title: str) -> Table:
    """What was measured; the batch of each stage that is nearest to the choice is marked."""
    table = Table(title=title)
    for header in ("stage", "patches", "batch", "ms / iteration", "us / image-iteration", ""):
        table.add_column(header, justify="right")
    for index, (kept, seconds) in enumerate(zip(tuned.key.kept, tuned.timings, strict=True)):
        chosen = tuned.batches[index]
        nearest = min(seconds, key=lambda batch: abs(batch - chosen))
        for batch, each in seconds.items():
            mark = "" if batch != nearest else "chosen" if batch == chosen else f"chosen: {chosen}"
            row = (str(index + 1), str(kept), str(batch), f"{each * 1e3:.2f}", f"{each / batch * 1e6:.1f}", mark)
            table.add_row(*row)
    return table
