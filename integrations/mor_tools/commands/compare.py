"""Compare configurations fairly: train each on the same text with several seeds, at equal cost.

    mor compare dense.yaml looped.yaml --equal flops --seeds 3
    mor compare dense.yaml looped.yaml --equal parameters,flops --plan

Leaves compare.html, compare.md and compare.json. Run it again to resume: finished runs are kept.
"""

import argparse
import os
import sys

from rich.console import Console

from mor_tools.comparison.command_line import planned


def run(options: argparse.Namespace) -> None:
    """Print the runs, and let torchrun start the processes that take them.

    Raises:
        ValueError: an option or a setting is wrong, or the models cannot be compared.
        OSError: a file is missing.
    """
    from mor_tools.comparison.tables import plan_table

    comparison = planned(options)  # before any process starts
    Console().print(plan_table(comparison))
    if options.plan:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [sys.executable, *torchrun, str(options.processes), "-m", "mor_tools.comparison"]
    sys.stdout.flush()
    # torchrun takes the place of this process, so that signals and the exit code are its own.
    os.execv(sys.executable, [*command, *_arguments(options)])


def _arguments(options: argparse.Namespace) -> list[str]:
    """The options as words again."""
    words = [*map(str, options.configs), f"--equal={options.equal}", f"--seeds={options.seeds}"]
    words += [f"--output={options.output}", f"--tolerance={options.tolerance}"]
    words += [f"--set={change}" for change in options.set]
    words += [] if options.budget is None else [f"--budget={options.budget!r}"]
    return words
