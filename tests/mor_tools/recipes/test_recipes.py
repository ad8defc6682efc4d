"""Recipes: their heads say what the accounting says, their twins train, and each can be planned."""

import contextlib
import io
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mor_layers import from_mapping, to_mapping
from mor_tools import commands
from mor_tools.pretraining.settings import Settings
from mor_tools.recipes import recipe, recipes, tiny_twin
from tests.distributed.pool import WorkerPool
from tests.mor_tools.pretraining.runs import write_text

RECIPES = recipes()
ids = [found.name for found in RECIPES]


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
    if whole.recursion is None:
        return
    for name in ("sharing", "kv_policy", "share_norms", "expert_routers", "step_embeddings",
                 "input_injection", "sandwich_norms"):  # fmt: skip
        assert getattr(tiny.recursion, name) == getattr(whole.recursion, name)
    assert type(tiny.recursion.router) is type(whole.recursion.router)
    assert bool(tiny.schedule.prelude) == bool(whole.schedule.prelude)
    assert bool(tiny.schedule.coda) == bool(whole.schedule.coda)


def train_twins(*, folder: str, changes: list[str]) -> dict[str, list[float]]:
    """Two steps of each tiny twin on a rank of the pool; the losses of the steps by recipe."""
    from mor_megatron.platform import cpu
    from mor_tools.pretraining import distributed
    from mor_tools.pretraining.session import pretrain
    from mor_tools.reports.rows import read_rows

    os.environ["RANK"], os.environ["WORLD_SIZE"] = "0", "1"
    cpu.enable()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    losses = {}
    for found in recipes():
        values = OmegaConf.create(to_mapping(tiny_twin(found.settings)))
        changed = OmegaConf.merge(values, OmegaConf.from_dotlist(changes))
        output = f"{folder}/{found.name}"
        settings = from_mapping(Settings, OmegaConf.to_container(changed))
        settings = replace(settings, output=output)
        with distributed.model_parallel(settings), contextlib.redirect_stdout(io.StringIO()):
            pretrain(settings)
        losses[found.name] = [row.loss for row in read_rows(Path(output) / "history.jsonl")]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return losses


def test_every_tiny_twin_trains(pool: WorkerPool, tmp_path):
    changes = [*write_text(tmp_path), "data.held_out_share=0.2"]
    changes += ["parallel.overlap_grad_reduce=false", "evaluation.sample_tokens=0"]
    losses = pool.run(train_twins, folder=str(tmp_path), changes=changes)[0]
    assert list(losses) == ids
    for name, found in losses.items():
        assert len(found) == 2 and all(math.isfinite(loss) and loss > 0 for loss in found), name
        assert found[0] == pytest.approx(math.log(384), abs=0.5), name


@pytest.mark.full
@pytest.mark.parametrize("found", RECIPES, ids=ids)
def test_every_recipe_can_be_planned_for_up_to_1024_gpus(found, capsys):
    for gpus in (8, 128, 1024):
        commands.main(["plan", str(found.path), "--gpus", str(gpus), "--recompute", "none,full"])
    assert "error" not in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys):
    commands.main(["recipes"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ids)
    commands.main(["recipes", "mor_360m"])
    assert capsys.readouterr().out == recipe("mor_360m").text
    commands.main(["recipes", "mor_360m", "--tiny"])
    printed = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert from_mapping(Settings, printed) == tiny_twin(recipe("mor_360m").settings)
    for wrong in (["recipes", "mor_36m"], ["recipes", "--tiny"]):
        with pytest.raises(SystemExit) as stopped:
            commands.main(wrong)
        assert stopped.value.code == 2
    assert "Use one of early_exit_360m" in capsys.readouterr().err
