"""The recipes of this folder, their heads, and their costs."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mor_tools.comparison.costs import Costs
from mor_tools.pretraining.command_line import read_settings
from mor_tools.pretraining.settings import Settings

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A YAML file of this folder."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem

    @cached_property
    def text(self) -> str:
        """The content of the file."""
        return self.path.read_text("utf-8")

    @cached_property
    def settings(self) -> Settings:
        """The settings that the pretraining script reads from it."""
        return read_settings(str(self.path), [])

    @cached_property
    def costs(self) -> Costs:
        """What a run of it costs, counted from the settings."""
        return Costs(self.settings)

    @property
    def title(self) -> str:
        """The first sentence of the head."""
        return self._head[0]

    @property
    def source(self) -> str:
        """Where the model comes from."""
        return self._named("Source")

    @property
    def stated_costs(self) -> str:
        """The costs that the head states."""
        return self._named("Costs")

    @property
    def counted_costs(self) -> str:
        """The costs as the head should state them."""
        costs = self.costs
        return (
            f"{costs.parameters:,} parameters ({costs.parameters - costs.embeddings:,} without "
            f"embeddings), {costs.forward_flops_per_token / 1e6:,.1f} forward and "
            f"{costs.flops_per_token / 1e6:,.1f} training MFLOP per token, {costs.kv_bytes:,.0f} KV "
            "bytes per token in bf16."
        )

    def _named(self, name: str) -> str:
        found = [line for line in self._head if line.startswith(f"{name}: ")]
        if len(found) != 1:
            raise ValueError(f"{self.path} must have one comment `# {name}: ...` in its head.")
        return found[0].removeprefix(f"{name}: ")

    @property
    def _head(self) -> list[str]:
        """The paragraphs of the comment at the top; an indented line continues the one before."""
        head = re.match(r"(?:#.*\n)+", self.text)
        return re.sub(r"\n#\s\s+", " ", head[0] if head else "").replace("# ", "").splitlines()


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    return [Recipe(path) for path in sorted(_FOLDER.glob("*.yaml"))]


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: there is none.
    """
    known = {found.name: found for found in recipes()}
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}. Use one of {', '.join(known)}.")
    return known[name]
