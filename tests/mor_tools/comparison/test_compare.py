"""A comparison from files to pages: its numbers are those of the runs, and it resumes."""

import contextlib
import io
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import WorkerPool
from tests.mor_tools.comparison.test_plan import DENSE, LOOPED, write
from tests.mor_tools.pretraining.runs import without_drawings, write_text

SMALL = [
    "training.steps=6",
    "training.warmup_steps=1",
    "training.decay_steps=2",
    "evaluation.every=2",
    "evaluation.batches=1",
    "data.held_out_share=0.2",
    "log_every=2",
]


def compare_on_rank(
    *, files: list[Path], output: Path, changes: list[str], runs: int | None = None
):
    """The work of `mor compare` on a rank of the pool, and what it printed.

    Args:
        runs: ask the comparison to stop in the run after this many.
    """
    from rich.console import Console

    from mor_megatron.platform import cpu
    from mor_tools.comparison import runs as comparison_runs
    from mor_tools.comparison.plan import plan

    os.environ["RANK"] = str(torch.distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cpu.enable()
    comparison = plan(files, ["flops"], seeds=2, output=output, changes=changes)
    pretrain, taken = comparison_runs.pretrain, 0

    def counted(settings, **options):
        nonlocal taken
        from mor_tools.pretraining import distributed

        if runs is not None and taken == runs:
            distributed.StopRequest.__call__ = lambda self: True
        taken += 1
        pretrain(settings, **options)

    from mor_tools.pretraining.distributed import StopRequest

    whole = StopRequest.__call__
    comparison_runs.pretrain = counted
    printed = io.StringIO()
    try:
        with without_drawings(), contextlib.redirect_stdout(io.StringIO()):
            is_done = comparison_runs.compare(comparison, Console(file=printed, width=200))
    finally:
        comparison_runs.pretrain, StopRequest.__call__ = pretrain, whole
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return is_done, printed.getvalue()


@pytest.fixture(scope="module")
def compared(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a comparison that was stopped in its second run and resumed, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison")
    options = {
        "files": write(folder, dense=DENSE, looped=LOOPED),
        "output": folder / "out",
        "changes": [*SMALL, *write_text(folder)],
    }
    stopped = pool.run(compare_on_rank, runs=1, **options)[0]
    part = json.loads((folder / "out" / "compare.json").read_text())
    done = pool.run(compare_on_rank, **options)[0]
    again = pool.run(compare_on_rank, **options)[0]
    return folder / "out", part, (stopped, done, again)


def test_an_interrupted_comparison_resumes_and_takes_no_run_twice(compared):
    folder, part, ((was_done, _), (is_done, printed), (_, again)) = compared
    assert (was_done, is_done) == (False, True)
    assert [len(model["runs"]) for model in part["models"]] == [1]
    assert "1 of 4 runs are finished." in part["notes"]
    assert "run 1 of 4: dense, seed 1: finished before" in printed
    assert re.search(r"run 2 of 4: looped, seed 1: \d+ steps", printed)
    assert again.count("finished before") == 4
    rows = (folder / "looped" / "seed-1" / "history.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1))


def test_the_numbers_are_those_of_the_runs_histories(compared):
    folder, _, _ = compared
    values = json.loads((folder / "compare.json").read_text())
    dense, looped = values["models"]
    assert looped["steps"] > dense["steps"] == 6
    ends = {}
    for model in (dense, looped):
        for run in model["runs"]:
            place = folder / model["name"] / f"seed-{run['seed']}"
            rows = [json.loads(row) for row in (place / "history.jsonl").read_text().splitlines()]
            causal = model["name"] == "looped"
            name = "causal_validation_loss" if causal else "validation_loss"
            losses = {row["step"]: row[name] for row in rows if row[name] is not None}
            assert {p["step"]: p["loss"] for p in run["curve"]} == losses
            assert run["loss"] == pytest.approx(rows[-1][name], abs=1e-9)
            assert run["curve"][-1]["tokens"] == 4 * 32 * model["steps"]
            speeds = [row["tokens_per_second"] for row in rows[1::2]]
            logged = [row for row in rows if row["tokens_per_second"] is not None]
            assert len(logged) >= len(speeds) > 1
            since, seconds = 0, 0.0
            for row in logged:
                seconds += (row["step"] - since) * 4 * 32 / row["tokens_per_second"]
                since = row["step"]
            assert run["curve"][-1]["seconds"] == pytest.approx(seconds)
            ends[model["name"], run["seed"]] = run["loss"]
    difference = sum(ends["looped", s] - ends["dense", s] for s in (1, 2)) / 2
    assert looped["difference"]["mean"] == pytest.approx(difference)
    assert dense["runs"][0]["curve"][-1]["flops"] == pytest.approx(values["budget"]["flops"])
    assert dense["depth_shares"] is None
    assert sum(looped["depth_shares"]) == pytest.approx(1)
    summary = json.loads((folder / "looped" / "seed-2" / "summary.json").read_text())
    assert looped["parameters"] == summary["parameters"]


def test_the_page_and_the_table_show_these_numbers(compared):
    folder, _, _ = compared
    values = json.loads((folder / "compare.json").read_text())
    page, markdown = ((folder / f"compare.{kind}").read_text() for kind in ("html", "md"))
    assert page.count("<svg") == 5  # losses over three quantities, and two panels more
    assert not re.search(r"#0[de]00\d\d", page)
    for model in values["models"]:
        spread = model["held_out_loss"]
        shown = f"{spread['mean']:.3f} ± {spread['deviation']:.3f}"
        for text in (page, markdown):
            assert shown in text
            assert f"{model['parameters']:,}" in text
    verdict = values["models"][1]["difference"]["verdict"]
    assert verdict in page and verdict in markdown


def test_another_comparison_in_the_folder_is_refused_before_any_run(compared, pool: WorkerPool):
    folder, _, _ = compared
    before = (folder / "compare.json").read_text()
    changes = [*SMALL, *write_text(folder.parent), "training.learning_rate=1e-3"]
    files = [folder.parent / "dense.yaml", folder.parent / "looped.yaml"]
    with pytest.raises(AssertionError, match="holds a run with other settings"):
        pool.run(compare_on_rank, files=files, output=folder, changes=changes)
    assert (folder / "compare.json").read_text() == before
