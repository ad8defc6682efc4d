"""Recipes: their heads say what the accounting says, their twins train, and each can be planned."""

import math
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from omegaconf import OmegaConf

from mor_layers import RecursionConfig, TokenChoice, from_mapping, to_mapping
from mor_tools import commands
from mor_tools.pretraining.command_line import read_settings
from mor_tools.pretraining.settings import Settings
from mor_tools.recipes import recipe, recipes, tiny_twin
from tests.distributed.pool import WorkerPool

RECIPES = recipes()
ids = [found.name for found in RECIPES]
VOCABULARY, VOCABULARY_ROWS = 300, 384


@pytest.mark.parametrize("found", RECIPES, ids=ids)
def test_the_head_states_what_the_accounting_counts(found):
    assert found.stated_costs == found.counted_costs
    assert found.title.endswith(".") and len(found.title) < 120
    assert "arXiv" in found.source
    assert found.settings.output == f"runs/{found.name}"


def test_published_sizes_are_met():
    """Parameters without embeddings of the 360M shape, and those of published looped models."""
    millions = {
        "mor_360m": 118, "plain_360m": 315, "early_exit_360m": 98,
    }  # fmt: skip
    for name, expected in millions.items():
        costs = recipe(name).costs
        assert round((costs.parameters - costs.embeddings) / 1e6) == expected
    assert recipe("huginn_like").costs.parameters == pytest.approx(3.5e9, rel=0.01)
    assert recipe("nanbeige_like").costs.parameters == pytest.approx(4.17e9, rel=0.01)
    assert recipe("ouro_like").costs.parameters == pytest.approx(1.43e9, rel=0.01)


@pytest.mark.parametrize("found", RECIPES, ids=ids)
def test_a_tiny_twin_keeps_every_choice(found):
    whole, tiny = found.settings, tiny_twin(found.settings)
    assert tiny == from_mapping(Settings, to_mapping(tiny))
    assert (tiny.recursion is None) == (whole.recursion is None)
    assert (tiny.model.moe is None) == (whole.model.moe is None)
    for own, original in zip(tiny.recursions, whole.recursions, strict=True):
        for name in ("sharing", "kv_policy", "share_norms", "expert_routers", "step_embeddings",
                     "input_injection", "sandwich_norms"):  # fmt: skip
            assert getattr(own, name) == getattr(original, name)
        assert type(own.router) is type(original.router)
    for own, original in zip(tiny.schedules, whole.schedules, strict=True):
        assert bool(own.prelude) == bool(original.prelude)
        assert bool(own.coda) == bool(original.coda)


def test_the_middle_half_twice_is_one_line():
    found = recipe("middle_twice_360m")
    (line,) = (line for line in found.text.splitlines() if "recursion" in line)
    assert line == "recursion: {num_recursions: 2, prelude_layers: 8, coda_layers: 8}"
    middle = list(range(8, 24))
    expected = [*range(8), *middle, *middle, *range(24, 32)]
    assert list(found.settings.schedule.unrolled) == expected


def test_a_recipe_has_several_recursions():
    settings = recipe("two_recursions_360m").settings
    assert [s.num_recursions for s in settings.schedules] == [2, 3]
    assert [s.num_unrolled_layers for s in settings.schedules] == [12, 20]
    # One recursion is changed, or another router is given to it, by its number.
    path = str(recipe("two_recursions_360m").path)
    changed = read_settings(
        path, ["recursion.1.kv_policy=exit_state", "recursion.0.num_recursions=2"]
    )
    assert changed.recursions[1] == replace(settings.recursions[1], kv_policy="exit_state")
    assert changed.recursions[0] == settings.recursions[0]
    routed = read_settings(path, ["recursion.1.router.type=token_choice"]).recursions[1]
    assert routed.router == TokenChoice()
    with pytest.raises(ValueError, match=r"Say which one you mean, e.g. recursion.0.kv_policy="):
        read_settings(path, ["recursion.kv_policy=exit_state"])
    spread = ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"]
    with pytest.raises(ValueError, match="recursion has 2 entries, but parallel"):
        read_settings(path, spread)
    with pytest.raises(ValueError, match="one with a single recursion, but recursion lists 2"):
        read_settings(path, ["uptrain.teacher=folder"])
    assert read_settings(path, ["recursion=null"]).recursion is None
    one = read_settings(path, ["recursion=[{num_recursions: 3}]"])
    assert one.recursion == RecursionConfig(3)


def train_twins() -> dict[str, list[float]]:
    """Two steps of each tiny twin on random tokens, on a rank of the pool; the losses by recipe."""
    from mor_megatron.platform import cpu
    from mor_tools.pretraining import distributed
    from mor_tools.pretraining.models import build
    from mor_tools.pretraining.models.decoder import decoder_config
    from mor_tools.pretraining.training import Trainer

    cpu.enable()
    losses = {}
    for found in RECIPES:
        tiny = tiny_twin(found.settings)
        # Only its backward hooks differ, which need every gradient of the real run.
        settings = replace(tiny, parallel=replace(tiny.parallel, overlap_grad_reduce=False))
        build.check(settings)
        with distributed.model_parallel(settings):
            distributed.seed(1, step=0)
            chunks = build.build_model(settings, VOCABULARY)
            trainer = Trainer(settings, chunks, decoder_config(settings, VOCABULARY), Unwatched())
            batches = repeat(random_batch(settings))
            losses[found.name] = [trainer.train_step(batches).loss for _ in range(2)]
    return losses


class Unwatched:
    """Stands in for the watch over a run of several ranks."""

    def beat(self, doing: str) -> None:
        pass


def random_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """What the pretraining script's datasets give, of two documents."""
    size = settings.training.micro_batch_size, settings.data.sequence_length
    tokens = torch.randint(VOCABULARY, size)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones(size),
        "documents": (torch.arange(size[1]) > 9).long().expand(size),
    }


def test_every_tiny_twin_trains(pool: WorkerPool):
    losses = pool.run(train_twins)[0]
    assert list(losses) == ids
    for name, (first, second) in losses.items():
        assert first == pytest.approx(math.log(VOCABULARY_ROWS), abs=0.5), name
        assert second < first, name  # the same batch again


@pytest.mark.full
@pytest.mark.parametrize("found", RECIPES, ids=ids)
def test_every_recipe_can_be_planned_for_up_to_1024_gpus(found, capsys):
    for gpus in (8, 128, 1024):
        commands.main(["plan", str(found.path), "--gpus", str(gpus), "--recompute", "none,full"])
    assert "error" not in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys, tmp_path):
    commands.main(["recipes"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ids)
    commands.main(["recipes", "mor_360m"])
    assert capsys.readouterr().out == recipe("mor_360m").text
    commands.main(["recipes", "mor_360m", "--tiny"])
    printed = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert from_mapping(Settings, printed) == tiny_twin(recipe("mor_360m").settings)
    commands.main(["recipes", "mor_360m", "--output", str(tmp_path / "mine.yaml")])
    assert (tmp_path / "mine.yaml").read_text() == recipe("mor_360m").text
    assert capsys.readouterr().out == ""
    for wrong in (["recipes", "mor_36m"], ["recipes", "--tiny"]):
        with pytest.raises(SystemExit) as stopped:
            commands.main(wrong)
        assert stopped.value.code == 2
    assert "Use one of early_exit_360m" in capsys.readouterr().err
