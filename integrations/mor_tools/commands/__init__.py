"""The console command `mor`: one module per subcommand."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast


class Command(Protocol):
    """The interface of a subcommand's module."""

    def add_arguments(self, options: argparse.ArgumentParser) -> None:
        """Add the arguments of the subcommand to its parser."""
        ...

    def run(self, options: argparse.Namespace) -> None:
        """Run the subcommand."""
        ...


# The summaries repeat the first line of each module's docstring, so that `mor --help` answers
# without importing the modules: they need PyTorch, transformers or matplotlib, which take seconds
# to load.
_COMMANDS = {
    "card": (
        "card",
        "Write the model card of a finished pretraining run, ready for a model hub.",
    ),
    "compare": (
        "compare",
        "Compare configurations fairly: train each on the same text with several seeds, at equal "
        "cost.",
    ),
    "convert": (
        "convert",
        "Convert models between Hugging Face, ours, published MoR and Megatron; make dense ones "
        "recursive.",
    ),
    "generate": (
        "generate",
        "Continue a text and show how deep each token was computed, in colour.",
    ),
    "inspect": (
        "inspection",
        "Show what a model does with a text, token by token, on one HTML page.",
    ),
    "plan": (
        "plan",
        "Plan a training run: which parallel layouts fit, and how long a step should take.",
    ),
    "recipes": ("recipes", "List recipes of models to start from, or print one."),
    "serve": ("serve", "Serve a model over HTTP, in the OpenAI completions protocol."),
}
"""The module and the summary of each subcommand."""

_EXTRAS = {
    "matplotlib": "reports",
    "megatron": "megatron",
    "numpy": "megatron",
    "rich": "reports",
    "starlette": "serve",
    "tensorboard": "reports",
    "tokenizers": "hf",
    "transformers": "hf",
    "uvicorn": "serve",
    "wandb": "wandb",
}
"""The extra of this distribution that installs each optional package."""


def load(name: str) -> Command:
    """Import the module of a subcommand."""
    module, _ = _COMMANDS[name]
    return cast(Command, import_module(f"{__name__}.{module}"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; exits with code 2 if its arguments or files are wrong, or a package is
    missing.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = argparse.ArgumentParser(prog="mor", description="Mixture-of-Recursions models.")
    options.add_argument("--version", action=_Version, help="show the version and exit")
    commands = options.add_subparsers(required=True, metavar="command")
    named = next((word for word in words if not word.startswith("-")), None)
    try:
        for name, (_, summary) in _COMMANDS.items():
            own = commands.add_parser(name, help=summary, description=summary)
            if name == named:
                command = load(name)
                command.add_arguments(own)
                own.set_defaults(run=command.run)
        chosen = options.parse_args(words)
        chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        print(
            f"error: mor {named} needs {package}, which is not installed. Install it with "
            f'`pip install "mor-layers[{_EXTRAS[package]}]"`.',
            file=sys.stderr,
        )
        raise SystemExit(2) from None


class _Version(argparse.Action):
    """argparse's `version` action, which looks up the version only if it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **others: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **others)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mor_layers import __version__

        print(f"mor {__version__}")
        parser.exit()
