"""Benchmarks and experiments: ``python -m benchmarks list | run NAME [options] | render --check|--write``."""

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The command line, but for the options of an experiment."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description="Run experiments and render their tables.")
    commands = found.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the experiments, a line each")
    run = commands.add_parser("run", help="run one; run NAME --help says what it takes")
    run.add_argument("name")
    run.add_argument("options", nargs=argparse.REMAINDER)
    render = commands.add_parser("render", help="the tables in README.md, benchmarks/README.md and docs/")
    what = render.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="fail where one is stale, unknown or missing")
    what.add_argument("--write", action="store_true", help="make them anew from benchmarks/results/")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; argparse itself ends with 2 where the words make no sense."""
    commands = parser()
    args = commands.parse_args(arguments)
    # here, since the process of a worker imports this module again
    from benchmarks.experiment import EXPERIMENTS, TABLES, load_all
    from benchmarks.harness.tables import ROOT, render

    load_all()
    if args.command == "list":
        width = max(map(len, EXPERIMENTS))
        print(*(f"{name:{width}}  {one.summary}" for name, one in sorted(EXPERIMENTS.items())), sep="\n")
        return 0
    if args.command == "run":
        if args.name not in EXPERIMENTS:
            commands.error(f"run {args.name!r}: no such experiment; known: {', '.join(sorted(EXPERIMENTS))}")
        EXPERIMENTS[args.name].main(args.options)
        return 0
    problems = render(ROOT, TABLES, write=args.write)
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
