"""The console command `mor`: `command_line` says what it accepts, and one module per subcommand works.

In a checkout, `python -m mor_tools.commands` does the same.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from mor_tools import terminal
from mor_tools.commands.command_line import COMMANDS

_EXTRAS = {
    "matplotlib": "reports",
    "megatron": "megatron",
    "numpy": "megatron",
    "psutil": "megatron",
    "rich": "reports",
    "starlette": "serve",
    "tensorboard": "reports",
    "tokenizers": "hf",
    "transformers": "hf",
    "uvicorn": "serve",
    "wandb": "wandb",
}
"""The extra of this distribution that installs each optional package."""
_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def load(name: str) -> Callable[[argparse.Namespace], None]:
    """Import the module of a subcommand; its function that does the work."""
    return import_module(f"{__name__}.{COMMANDS[name].module}").run


def parser() -> argparse.ArgumentParser:
    """The command line of `mor`. A parsed one has the name of its subcommand as `command`."""
    options = argparse.ArgumentParser(prog="mor", description="Mixture-of-Recursions models.")
    options.add_argument("--version", action=_Version, help="show the version and exit")
    commands = options.add_subparsers(required=True, metavar="command", dest="command")
    for name, interface in COMMANDS.items():
        own = commands.add_parser(name, help=interface.summary, description=interface.summary)
        interface.add_options(own)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; exits with code 2 if its arguments or files are wrong, or a package is
    missing.
    """
    options = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what it could complete
        import argcomplete  # pyright: ignore[reportMissingImports]

        argcomplete.autocomplete(options)
    chosen = options.parse_args(arguments)
    try:
        with terminal.working(f"starting mor {chosen.command}"):  # imports take seconds
            run = load(chosen.command)
        run(chosen)
    except (ValueError, OSError) as error:
        print(terminal.error(str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        message = (
            f"mor {chosen.command} needs {package}, which is not installed. Install it with "
            f'`pip install "mor-layers[{_EXTRAS[package]}]"`.'
        )
        print(terminal.error(message), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(file=sys.stderr)  # below the ^C of the terminal
        raise SystemExit(_INTERRUPTED) from None


class _Version(argparse.Action):
    """argparse's `version` action, which looks up the version only if it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **others: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **others)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mor_layers import __version__

        print(f"mor {__version__}")
        parser.exit()
