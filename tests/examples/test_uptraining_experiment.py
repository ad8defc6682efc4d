"""The uptraining experiment runs, spends equal FLOPs, and keeps what is done."""

import json
from pathlib import Path

import pytest

from experiments import uptraining


def test_every_beginning_spends_the_same_flops_and_done_runs_are_kept(short_text, tmp_path, capsys):
    output = tmp_path / "run"
    table = uptraining.main(["--quick", "--seeds", "1", "--output", str(output)])
    names = {variant.name for variant in uptraining.variants()}
    assert len(names) == 20
    assert set(table) == names | {uptraining.DENSE, uptraining.DENSE_ON, uptraining.SCRATCH}
    budget = table[uptraining.DENSE_ON]["flops"]
    for name in names:
        one_step = table[name]["flops"] / table[name]["steps"]
        assert abs(table[name]["flops"] - budget) <= 0.51 * one_step
    assert table["stepwise, distilled"]["steps"] < table["stepwise"]["steps"]
    assert table["stepwise, relaxed"]["parameters"] > table["stepwise"]["parameters"]
    before = [table[f"{i}, relaxed"]["before"]["mean"] for i in ("stepwise", "average")]
    assert before != [table[i]["before"]["mean"] for i in ("stepwise", "average")]
    assert all(row["after"]["mean"] < row["before"]["mean"] for row in table.values())
    assert (output / "results.svg").read_text().startswith("<?xml")

    results = json.loads((output / "results.json").read_text())
    dropped = results["runs"].pop(3)
    (output / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    again = uptraining.main(["--quick", "--seeds", "1", "--output", str(output)])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed")]
    assert len(printed) == 1
    assert dropped["name"] in printed[0]
    assert again[dropped["name"]] == table[dropped["name"]]


def test_results_of_another_plan_are_not_mixed(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps({"plan": {"dense_steps": 1}, "runs": []}))
    with pytest.raises(SystemExit, match="another plan"):
        uptraining.Results(tmp_path, uptraining.QUICK)
