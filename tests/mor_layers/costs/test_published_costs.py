"""The published cost of the 360M models: what was counted there, and what we count."""

import pytest

from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig
from mor_layers.costs import account

# Forward MFLOP per token, and tokens (1e9) that the published 16.5e18 forward FLOPs pay for by that
# count; plain, 2 and 3 recursions.
PUBLISHED = {1: 833.6, 2: 623.5, 3: 555.6}
TOKENS = {1: 19.8, 2: 26.5, 3: 29.7}
LENGTH, BUDGET = 2048, 16.5e18


def forward(recursions: int, kv_heads: int, with_logits: bool) -> float:
    recursion = RecursionConfig(recursions, router=ExpertChoice()) if recursions > 1 else None
    model = DecoderConfig(
        49152, 960, 2560, 32, 15, kv_heads, tie_embeddings=True, recursion=recursion
    )
    cost = account(model, LENGTH, causal_half=True).forward
    parts = cost.total - cost.depth_router - (0 if with_logits else cost.output)
    return parts / LENGTH / 1e6


@pytest.mark.parametrize("recursions", PUBLISHED)
def test_published_flops_leave_out_logits_and_project_keys_for_every_head(recursions: int) -> None:
    counted = forward(recursions, kv_heads=15, with_logits=False)
    assert counted == pytest.approx(PUBLISHED[recursions], rel=1e-3)
    assert BUDGET / counted / 1e15 == pytest.approx(TOKENS[recursions], rel=2e-3)


def test_what_really_runs_differs_from_it_by_up_to_a_tenth() -> None:
    with_logits = {n: forward(n, 5, True) / PUBLISHED[n] for n in PUBLISHED}
    without = {n: forward(n, 5, False) / PUBLISHED[n] for n in PUBLISHED}
    assert with_logits == pytest.approx({1: 1.019, 2: 1.055, 3: 1.073}, abs=1e-3)
    assert without == pytest.approx({1: 0.906, 2: 0.903, 3: 0.903}, abs=1e-3)
