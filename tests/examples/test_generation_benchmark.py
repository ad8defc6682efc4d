"""The benchmark of generation writes the rows that its page quotes."""

import json
import sys

import pytest
import torch

from benchmarks import generation

QUICK = ["--batch", "4", "--kv-sequences", "4", "--tokens", "16", "--turns", "1"]
QUICK += ["--new-tokens", "12", "--vocabulary", "64"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "recursions"),
    [("float32", ["4"]), pytest.param("bfloat16", ["2", "4"], marks=pytest.mark.full)],
)
def test_rows_have_ratios_limits_and_exact_bytes(tmp_path, monkeypatch, dtype, recursions):
    file = tmp_path / "rows.json"
    options = ["--shapes", "small", "--recursions", *recursions, "--dtype", dtype]
    options += ["--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["generation.py", *options, *QUICK])
    generation.main()
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(recursions) * 2 * 2  # policies, budgets
    for row in rows:
        steps = row["num_recursions"]
        is_wise = row["kv_policy"] == "recursion_wise"
        expected = (steps + 1) / (2 * steps) if is_wise else 1 / steps
        assert row["kv_bytes_ratio"] == pytest.approx(expected)
        assert row["throughput_ratio"] > 0
        assert 1 < row["mean_depth"] <= steps
        if row["budget"] == "equal_kv":
            assert row["sequences"] >= row["plain_sequences"]
