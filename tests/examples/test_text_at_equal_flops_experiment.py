"""The text experiment tunes every family alike and compares each with what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import text_at_equal_flops as experiment
from mor_tools.comparison.plan import plan

LOSSES = {"plain": (4.0, 4.2, 4.4), "loop": (3.9, 4.0, 4.1), "loop_hyper": (3.7, 3.9, 4.1)}


def found(losses: dict[str, tuple[float, ...]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "name": name,
            "parameters": 1000,
            "kv_bytes_per_token": 64.0,
            "steps": 10,
            "held_out_loss": {"mean": sum(values) / len(values)},
            "runs": [{"seed": n, "loss": value} for n, value in enumerate(values, start=1)],
        }
        for name, values in losses.items()
    }


def test_models_of_experts_have_equal_parameters_and_all_equal_key_value_bytes(tmp_path: Path):
    rates = [(name, 5e-3) for name in experiment.FAMILIES if name != "mor"]
    files = experiment.write_files(tmp_path, experiment.Plan(), rates, name_rates=False)
    by_name = {file.stem: file for file in files}
    plan(files, ["flops", "kv"])  # refuses what differs
    experts = [by_name["experts"], by_name["expert_loop_own"], by_name["expert_loop_own_hyper"]]
    plan(experts, ["flops", "parameters"])


def test_an_ingredient_is_compared_with_the_loop_that_lacks_it():
    # -0.2, -0.1 and 0: mean -0.1, deviation 0.1, so 4.303 * 0.1 / sqrt(3) to each side.
    shown = experiment.difference(found(LOSSES), "loop_hyper", "loop")
    assert shown.mean == pytest.approx(-0.1)
    assert shown.half_width == pytest.approx(0.24843, rel=1e-4)
    rates = dict.fromkeys(LOSSES, 5e-3)
    table = experiment.markdown(found(LOSSES), rates)
    assert "| loop | -0.100 ± 0.248: no difference beyond the spread |" in table
    assert (
        "| plain | -0.200 ± 0.248: no difference beyond the spread |" in table
    )  # -0.1, -0.2, -0.3


def test_each_family_takes_the_learning_rate_of_its_lowest_loss():
    rates = experiment.QUICK.learning_rates
    labels = [(name, rate) for name in experiment.FAMILIES for rate in rates]
    losses = {f"{n}@{r:g}": (5.0 if (n == "loop") == (r == rates[0]) else 6.0,) for n, r in labels}
    best = experiment.best_rates(found(losses), labels)
    assert best == dict.fromkeys(experiment.FAMILIES, rates[1]) | {"loop": rates[0]}
    del losses[f"mor@{rates[1]:g}"]  # diverged
    assert experiment.best_rates(found(losses), labels)["mor"] == rates[0]
    del losses[f"mor@{rates[0]:g}"]
    with pytest.raises(RuntimeError, match="mor diverged with every learning rate"):
        experiment.best_rates(found(losses), labels)


def test_a_best_rate_at_an_end_of_the_grid_is_followed_by_one_beyond_it():
    plan = experiment.Plan(learning_rates=(2e-3, 5e-3, 1.25e-2))
    best = {"plain": 2e-3, "loop": 5e-3, "mor": 1.25e-2}
    assert experiment.further_rates(best, plan) == [
        ("plain", pytest.approx(8e-4)),
        ("mor", pytest.approx(3.125e-2)),
    ]


def test_tuning_comes_first_and_its_best_rates_are_those_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def run(command: list[str], *, check: bool) -> None:
        files = [Path(word) for word in command if word.endswith(".yaml")]
        calls.append(
            [yaml.safe_load(file.read_text())["training"]["learning_rate"] for file in files]
        )
        output = next(word.partition("=")[2] for word in command if word.startswith("--output"))
        losses = {f.stem: (6.0 - calls[-1][i],) * 2 for i, f in enumerate(files)}
        Path(output).mkdir(parents=True, exist_ok=True)
        models = {"models": list(found(losses).values())}
        Path(output, "compare.json").write_text(json.dumps(models))

    monkeypatch.setattr(experiment.subprocess, "run", run)
    experiment.main(["--quick", "--output", str(tmp_path)])
    tuning, further, runs = calls  # with losses that fall with the rate
    assert tuning == list(experiment.QUICK.learning_rates) * len(experiment.FAMILIES)
    highest = max(experiment.QUICK.learning_rates) ** 2 / min(experiment.QUICK.learning_rates)
    assert further == pytest.approx(tuning + [highest] * len(experiment.FAMILIES))
    assert runs == pytest.approx([highest] * len(experiment.FAMILIES))
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert "| `expert_loop_own_scaled` |" in (tmp_path / "results.md").read_text()
