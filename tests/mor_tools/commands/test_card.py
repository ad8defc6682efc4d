"""The model card of a run: its figures are those of the summary, and hubs can read its head."""

import json
import math

import pytest
import yaml

from mor_layers import to_mapping
from mor_tools import commands
from mor_tools.comparison.costs import Costs
from mor_tools.recipes import recipe, tiny_twin

SETTINGS = tiny_twin(recipe("mor_moe_360m").settings)
SUMMARY = {
    "validation_loss": 3.25,
    "causal_validation_loss": 3.5,
    "unigram_entropy": 6.125,
    "tokens_per_second": 1234.0,
    "parameters": 47488,
    "flops_per_token": 445000.0,
    "depth_shares": [0.0, 0.25, 0.25, 0.5],
    "causal_depth_shares": [0.0, 0.5, 0.25, 0.25],
    "steps": 2,
    "sample": "def |\n```\n---\nend",
    "versions": {"python": "3.12", "torch": "2.11", "transformer-engine": None},
    "settings": to_mapping(SETTINGS),
}


def write_run(folder, **changes):
    run = folder / "my-run"
    (run / "model").mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return run


def test_the_card_has_the_figures_of_the_run(tmp_path, capsys):
    run = write_run(tmp_path)
    commands.main(["card", str(run), "--license", "apache-2.0"])
    card = (run / "model" / "README.md").read_text()
    assert f"wrote {run}/model/README.md" in capsys.readouterr().out
    _, head, body = card.split("---\n", 2)
    values = yaml.safe_load(head)
    assert (values["license"], values["language"]) == ("apache-2.0", "en")
    assert {"mixture-of-recursions", "mixture-of-experts"} <= set(values["tags"])
    (index,) = values["model-index"]
    assert index["name"] == "my-run"
    metrics = {m["type"]: m["value"] for m in index["results"][0]["metrics"]}
    assert metrics == {"loss": 3.5, "perplexity": round(math.exp(3.5), 3)}
    assert "# my-run" in body
    assert "1 + 2 × 3 + 1 layers (router ExpertChoice, KV policy `recursion_wise`)" in body
    for figure in ("3.500 nats per token", "| 3.250 |", "47,488", "4.45e+05", "1: 50% · 2: 25%",
                   f"{Costs(SETTINGS).kv_bytes:,.0f}", "2 of 2 sequences of 32 tokens"):  # fmt: skip
        assert figure in body, figure
    # Nothing in a sample ends the block that quotes it.
    assert "    def |\n    ```\n    ---\n    end" in body


def test_a_plain_run_has_a_card_without_depths_or_licence(tmp_path):
    plain = tiny_twin(recipe("plain_360m").settings)
    changes = {"causal_validation_loss": None, "depth_shares": None, "causal_depth_shares": None}
    run = write_run(tmp_path, settings=to_mapping(plain), sample="", **changes)
    commands.main(["card", str(run), "--name", "plain: one", "--output", str(tmp_path / "card")])
    card = (tmp_path / "card" / "README.md").read_text()
    values = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in values
    assert values["model-index"][0]["name"] == "plain: one"
    assert "A decoder of 8 layers" in card
    assert "recursion steps" not in card and "continuation" not in card


def test_runs_that_are_not_finished_or_have_no_model_are_refused(tmp_path, capsys):
    run = write_run(tmp_path)
    (run / "model").rmdir()
    (tmp_path / "other").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "summary.json").write_text('{"settings": 3')
    for place, told in ((run, "writes no model"), (tmp_path / "other", "no summary.json"),
                        (damaged, "is damaged")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            commands.main(["card", str(place)])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err
