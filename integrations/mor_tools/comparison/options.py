"""The options of `mor compare`, which the processes that it starts read again.

The help of `mor` needs them, so this module imports no library that takes seconds to load.
"""

import argparse
from pathlib import Path

QUANTITIES = ("flops", "tokens", "parameters", "kv")
"""What can be made equal, by its name on the command line."""


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Define the options."""
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
