"""The experiment on routers' health: its figures, and that it runs and resumes."""

import json
import math

import pytest
import torch

from experiments import router_health as experiment
from experiments.router_health import QUICK, Figures
from mor_layers import ExpertChoice, TokenChoice
from mor_layers.inspection import inspect_text
from tests.mor_layers.small_models import random_ids, small_config, small_model

LN_3 = math.log(3)


def test_shares_and_entropies_are_those_worked_out_by_hand():
    depths = torch.tensor([1, 1, 2, 3, 1, 3])
    assert experiment.depth_shares(depths, 3) == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    assert experiment.entropy(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(1.5 * math.log(2))
    rows = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    assert experiment.entropy(rows) == pytest.approx(LN_3 / 2)


@pytest.mark.parametrize("router", [ExpertChoice(alpha=0.7), TokenChoice()])
def test_figures_are_those_of_the_inspected_text(router):
    model, ids = small_model(small_config(router)).eval(), random_ids(1, 48)[0]
    found, seen = experiment.measure(model, ids, 8), inspect_text(model, ids, 8)
    counts = [int((seen.training_depths == depth).sum()) for depth in (1, 2, 3)]
    assert found.max_violation == pytest.approx(3 * max(counts) / sum(counts) - 1)
    assert 0 < found.entropy < LN_3 and found.dead == seen.dead_shares[2]
    if isinstance(router, TokenChoice):
        assert found.agreement is None and 0 < found.entropy_of_tokens < LN_3
    else:
        assert found.agreement == pytest.approx((seen.agreement[1] + seen.agreement[2]) / 2)
        assert found.agreement < 1 and found.entropy_of_tokens is None


def test_the_table_has_the_published_figures_beside():
    runs = [Figures(0.01, 0.9, 0.1, 1.0, None), Figures(0.03, 0.92, 0.1, 1.0, None)]
    table = experiment.markdown(dict.fromkeys(experiment.routers(QUICK), runs), QUICK)
    assert "| expert choice (α = 0.1) | 2.0% ± 1.4% | 0.1% | 91.0% ± 1.4% | 99.2% |" in table
    assert "| 0.100 ± 0.000 | 0.266 | 1.000 ± 0.000 |  | 1.056 |" in table


def test_it_runs_and_resumes(short_text, tmp_path, capsys):
    arguments = ["--quick", "--output", str(tmp_path)]
    results = experiment.main(arguments)
    assert all(len(runs) == QUICK.seeds for runs in results.values())
    stored = json.loads((tmp_path / "results.json").read_text())
    capsys.readouterr()
    assert experiment.main(arguments) == results
    assert "seed 0," not in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == stored
    assert "99.2%" in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit):
        experiment.main(["--output", str(tmp_path)])  # another plan
