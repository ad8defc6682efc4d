"""The options of `mor compare`, which the processes that it starts read again."""

import argparse
from pathlib import Path

from mor_tools.comparison.costs import QUANTITIES
from mor_tools.comparison.plan import Comparison, plan


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Define them."""
    add = options.add_argument
    add("configs", type=Path, nargs="+", help="YAML files of the pretraining script; the first one "
        "is the reference")  # fmt: skip
    add("--equal", required=True, metavar="QUANTITY",
        help=f"one of {', '.join(QUANTITIES)}, or several with commas between")  # fmt: skip
    add("--seeds", type=int, default=3, help="runs of each file (default: 3)")
    add("--output", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="change a setting in all files")  # fmt: skip
    add("--budget", type=float, help="FLOPs, or with --equal tokens the tokens, of each run (default: "
        "those of the first file)")  # fmt: skip
    add("--tolerance", type=float, default=0.02,
        help="largest relative difference of parameters or kv (default: 0.02)")  # fmt: skip
    add("--processes", type=int, default=1, help="processes to run in (default: 1)")
    add("--plan", action="store_true", help="print the runs, and do not run them")


def planned(options: argparse.Namespace) -> Comparison:
    """The comparison that the options describe.

    Raises:
        ValueError: an option or a setting is wrong, or the models cannot be compared.
        FileNotFoundError: a file does not exist.
    """
    for change in options.set:
        if "=" not in change:
            raise ValueError(f"--set {change} is no key=value setting.")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes} must be at least 1.")
    return plan(
        options.configs,
        options.equal.split(","),
        seeds=options.seeds,
        output=options.output,
        changes=options.set,
        budget=options.budget,
        tolerance=options.tolerance,
    )
