"""``smi-fast tune``: measure, and choose the batch of each stage."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from smi_fast.cli import options as o
from smi_fast.cli.batches import usable_impl
from smi_fast.config import InversionConfig
from smi_fast.model import load_model
from smi_fast.storage.environment import device_name
from smi_fast.tuning.measure import DEFAULT_BATCH
from smi_fast.tuning.measure import tune as measure
from smi_fast.tuning.store import Tuned, all_tuned, save


def tune(
    model: o.Model = "demo",
    iterations: o.Iterations = 4000,
    stop: o.Stops = None,
    dense: o.Dense = False,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    impl: o.Impl = "compiled",
    checkpoint: o.Checkpoint = None,
    pretrained: o.Pretrained = None,
    image_size: o.ImageSize = None,
    most: Annotated[int, typer.Option(help="The largest batch to try.")] = 512,
    rounds: Annotated[int, typer.Option(help="Timings of each batch, of which the median counts.")] = 3,
    quiet: o.Quiet = False,
) -> None:
    """Measure which batch is best for each stage on this machine; `invert` and `plan` use it from then on."""
    config = InversionConfig(iterations=iterations, stops=o.parse_stops(stop, dense, iterations))
    for name, value in (("--most", most), ("--rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    o.check_impl(impl)
    all_tuned()  # a file that cannot be read is refused before the work, not after it
    where = o.parse_device(device)
    vit = load_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=image_size,
        dtype=o.parse_dtype(dtype, where),
        device=where,
    )
    console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
    usable = usable_impl(impl, where)
    if usable != impl:
        console.print(f"--impl {impl} does not work here (see smi-fast doctor): measuring {usable}")
    tuned = measure(vit, config, impl=usable, most=most, rounds=rounds, say=console.print)
    Console().print(_table(tuned, f"{model}, {tuned.key.precision}, {tuned.key.impl}, {device_name(where)}"))
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
