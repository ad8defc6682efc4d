"""`torchrun -m mor_tools.comparison FILE.yaml FILE.yaml --equal flops`; `mor compare` starts it."""

import argparse
import sys

from rich.console import Console

from mor_tools.comparison.command_line import planned
from mor_tools.comparison.options import add_arguments
from mor_tools.comparison.runs import compare
from mor_tools.pretraining import distributed, endings
from mor_tools.pretraining.launcher import LauncherLost

STOPPED = 3
"""Exit code of a comparison that was asked to stop before all runs were finished."""


def main(arguments: list[str]) -> None:
    """Run, or resume, the comparison that the arguments describe; exits with 2 where they are wrong."""
    options = argparse.ArgumentParser(prog="mor compare")
    add_arguments(options)
    try:
        comparison = planned(options.parse_args(arguments))
        console = Console() if distributed.is_first_rank() else None
        with distributed.connected(comparison.models[0].settings):
            is_done = compare(comparison, console)
    except distributed.ERRORS as error:
        endings.tell(str(error), distributed.is_first_on_machine())
        raise SystemExit(2) from None
    except LauncherLost as error:
        if distributed.is_first_on_machine():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not is_done:
        raise SystemExit(STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
