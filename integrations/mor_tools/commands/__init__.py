"""The console command `mor`: one module per subcommand."""

import argparse
import sys
from collections.abc import Sequence

from mor_tools.commands import convert, inspection, plan

_COMMANDS = {"convert": convert, "inspect": inspection, "plan": plan}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; exits with 2 where its arguments or files are wrong."""
    options = argparse.ArgumentParser(prog="mor", description="Mixture-of-Recursions models.")
    commands = options.add_subparsers(required=True, metavar="command")
    for name, command in _COMMANDS.items():
        summary = (command.__doc__ or "").split("\n\n")[0]
        own = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    chosen = options.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
