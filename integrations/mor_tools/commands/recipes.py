"""List recipes of models to start from, or print one.

    mor recipes
    mor recipes huginn_like --output mine.yaml
    mor recipes huginn_like --tiny --output try.yaml

A recipe is a file of settings of the pretraining script.
"""

import argparse
import sys

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from mor_layers import to_mapping
from mor_tools.recipes import Recipe, recipe, recipes, tiny_twin


def run(options: argparse.Namespace) -> None:
    """List, print or write.

    Raises:
        ValueError: there is no such recipe.
        OSError: the file cannot be written.
    """
    if options.name is None:
        if options.tiny or options.output is not None:
            raise ValueError("--tiny and --output need the name of a recipe.")
        Console().print(_listed())
        return
    found = recipe(options.name)
    text = _tiny(found) if options.tiny else found.text
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text, "utf-8")


def _tiny(found: Recipe) -> str:
    values = OmegaConf.create(to_mapping(tiny_twin(found.settings)))
    return f"# The tiny twin of {found.name}.\n{OmegaConf.to_yaml(values)}"


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
