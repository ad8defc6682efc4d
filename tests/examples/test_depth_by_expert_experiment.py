"""The depth-by-expert experiment runs, at equal tokens and at equal FLOPs."""

import json

from experiments import depth_by_expert


def test_every_model_is_measured_at_equal_tokens_and_at_equal_flops(short_text, tmp_path):
    output = tmp_path / "run"
    table = depth_by_expert.main(
        ["--quick", "--seeds", "1", "--steps", "2", "--length", "16", "--output", str(output)]
    )
    assert len(table) == 11
    plan = json.loads((output / "results.json").read_text())["plan"]
    tokens = plan["batch"] * plan["length"]
    budget = table[depth_by_expert.REFERENCE]["flops_per_token"] * plan["steps"] * tokens
    for row in table.values():
        (run,) = row["runs"]
        spent = run["steps_at_equal_flops"] * tokens * row["flops_per_token"]
        assert budget <= spent * 1.001
        assert spent < budget + 1.001 * tokens * row["flops_per_token"]
        assert all(abs(sum(cell) - 1) < 1e-6 for cell in run["cells"])
    assert (output / "results.png").stat().st_size > 1000
