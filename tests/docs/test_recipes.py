"""The recipes of docs/pages/recursion.md are settings of the pretraining script, shaped as they say."""

import re
from pathlib import Path

from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.models import build
from mor_tools.pretraining.models.decoder import decoder_config

PAGE = (Path(__file__).parents[2] / "docs" / "pages" / "recursion.md").read_text("utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHAPES = [(1, 2, 3, 1), (2, 4, 12, 2), (0, 24, 4, 0), (3, 6, 2, 3)]
"""Prelude, block, recursions and coda of each, as its text says."""


def test_each_recipe_has_the_shape_of_its_model(tmp_path):
    for recipe, shape in zip(RECIPES, SHAPES, strict=True):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        settings = load_settings(["--config", str(path)])
        build.check(settings)
        schedule = settings.schedule
        found = schedule.prelude, schedule.block_size, schedule.num_recursions, schedule.coda
        assert found == shape
        comment = re.search(r"# (\d+ \+ )?(\d+) × (\d+)( \+ \d+)?", recipe)
        assert [int(n) for n in re.findall(r"\d+", comment[0])] == [n for n in shape if n]
        has_experts = "moe" in recipe
        decoder = decoder_config(settings, 256)
        assert (decoder.moe is not None) == has_experts
        assert not decoder.dense_ends
