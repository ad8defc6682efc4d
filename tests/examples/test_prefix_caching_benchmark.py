"""The benchmark of shared prefixes measures what it says."""

import json
import sys

import pytest
import torch

from benchmarks import prefix_caching

QUICK = ["--requests", "3", "--system", "32", "--own", "5", "--distinct", "20", "--new-tokens", "2"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_only_the_shared_workload_saves_tokens(tmp_path, monkeypatch) -> None:
    file = tmp_path / "results.json"
    options = [*QUICK, "--rounds", "1", "--vocabulary", "64", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["prefix_caching.py", *options])
    prefix_caching.main()
    shared, distinct = json.loads(file.read_text())["results"]
    assert shared["cached_share"] == pytest.approx(2 * 32 / (3 * 37))
    assert distinct["cached_share"] == 0
    assert shared["seconds"]["ratio"] > 0 < shared["first_token"]["ratio"]
