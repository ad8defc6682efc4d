"""List recipes of models to start from, or print one.

mor recipes
mor recipes huginn_like > mine.yaml
mor recipes huginn_like --tiny > try.yaml
"""

import argparse
import sys

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from mor_layers import to_mapping
from mor_tools.recipes import recipe, recipes, tiny_twin


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The command line."""
    options.add_argument("name", nargs="?", help="the recipe to print (default: list them)")
    options.add_argument("--tiny", action="store_true", help="print its tiny twin, for a first try")


def run(options: argparse.Namespace) -> None:
    """List, or print.

    Raises:
        ValueError: there is no such recipe.
    """
    if options.name is None:
        if options.tiny:
            raise ValueError("--tiny needs the name of a recipe.")
        Console().print(_listed())
        return
    found = recipe(options.name)
    if not options.tiny:
        sys.stdout.write(found.text)
        return
    sys.stdout.write(f"# The tiny twin of {found.name}.\n")
    sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(to_mapping(tiny_twin(found.settings)))))


def _listed() -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for head in ("parameters", "training GFLOP/token", "KV KiB/token"):
        table.add_column(head, justify="right")
    for found in recipes():
        costs = found.costs
        table.add_row(
            found.name,
            found.title,
            f"{costs.parameters / 1e6:,.0f} M",
            f"{costs.flops_per_token / 1e9:.2f}",
            f"{costs.kv_bytes / 1024:,.1f}",
        )
    return table
