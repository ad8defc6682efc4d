"""Recipes: settings of the pretraining script for models that people start from.

Each is a YAML file in this folder, whose head says what it is, its source, where it differs, and what it
costs. `mor recipes` lists them, and `mor recipes NAME` prints one.
"""

from mor_tools.recipes.catalog import Recipe, recipe, recipes
from mor_tools.recipes.tiny import tiny_twin

__all__ = ["Recipe", "recipe", "recipes", "tiny_twin"]
