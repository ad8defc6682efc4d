"""What `inspect_text` says of a text, against one token and one prefix at a time."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from mor_layers import (
    DepthAndWidth,
    ExpertChoice,
    FixedDepth,
    MoEConfig,
    RecursionConfig,
    Router,
    RouterConfig,
)
from mor_layers.inspection import inspect_text, rank_correlation
from tests.mor_layers.small_models import (
    ROUTERS,
    VOCAB_SIZE,
    plain_config,
    random_ids,
    small_config,
    small_model,
)

LENGTH, WINDOW = 19, 8  # two whole windows and a part of one


@dataclass(frozen=True)
class Halting(RouterConfig):
    """A router that is not ours."""

    def build(self, hidden_size: int, num_recursions: int) -> Router:
        return HaltingRouter(hidden_size, num_recursions)


class HaltingRouter(Router):
    def __init__(self, hidden_size: int, num_recursions: int) -> None:
        super().__init__(num_recursions)
        self.scorers = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(num_recursions))

    def logits(self, hidden, step):
        return self.scorers[step](hidden)

    def decide(self, logits, step, previous, causal=False):
        return previous.keep_where(logits[..., 0] > 0)


EVERY_ROUTER = {**ROUTERS, "depth_and_width": DepthAndWidth(), "custom": Halting()}


def model_with(router: RouterConfig, with_experts: bool = False):
    config = small_config(router)
    if with_experts:
        config = replace(config, moe=MoEConfig(3, 2))
    return small_model(config).eval()


def text() -> torch.Tensor:
    return random_ids(1, LENGTH)[0]


@pytest.mark.parametrize("router", EVERY_ROUTER.values(), ids=list(EVERY_ROUTER))
@torch.no_grad()
def test_depth_and_surprise_are_those_of_every_prefix_alone(router):
    model, ids = model_with(router), text()
    seen = inspect_text(model, ids, WINDOW)
    assert math.isnan(seen.surprise[0])
    for token in range(LENGTH):
        prefix = ids[token - token % WINDOW : token + 1]
        output = model(prefix[None], causal_routing=True)
        assert seen.depths[token] == output.depths[0, -1]
        if token + 1 < LENGTH:
            p = output.logits[0, -1].softmax(dim=-1)[ids[token + 1]]
            assert seen.surprise[token + 1].item() == pytest.approx(-math.log(p), abs=1e-5)


@pytest.mark.parametrize("router", EVERY_ROUTER.values(), ids=list(EVERY_ROUTER))
@torch.no_grad()
def test_shares_and_dead_places_are_counts(router):
    model, ids = model_with(router), text()
    seen = inspect_text(model, ids, WINDOW)
    depths, deepest = seen.depths.tolist(), [0] * WINDOW
    for token, depth in enumerate(seen.training_depths.tolist()):
        deepest[token % WINDOW] = max(deepest[token % WINDOW], depth)
    for step in range(3):
        assert seen.shares[step] == pytest.approx(sum(d > step for d in depths) / LENGTH)
        dead = sum(depth <= step for depth in deepest) / WINDOW
        assert seen.dead_shares[step] == pytest.approx(dead)


@torch.no_grad()
def test_training_keeps_the_capacity_and_agreement_counts_candidates():
    model, ids = model_with(ExpertChoice(alpha=0.7)), text()
    seen = inspect_text(model, ids, WINDOW)
    alike, candidates = [0] * 3, [0] * 3
    for begin in range(0, LENGTH, WINDOW):
        part = ids[None, begin : begin + WINDOW]
        output = model(part)
        torch.testing.assert_close(seen.training_depths[begin : begin + WINDOW], output.depths[0])
        before = list(range(part.shape[1]))
        for step, decision in enumerate(output.recursions[0].decisions):
            ran = decision.tokens.positions[:, 0].tolist()
            alike[step] += round(float(decision.metrics["sampling_accuracy"]) * len(before))
            candidates[step] += len(before)
            before = ran
    expected = [a / c for a, c in zip(alike, candidates, strict=True)]
    expected[0] = 1.0  # its capacity is everything, in generation too
    assert seen.agreement == pytest.approx(expected)
    assert seen.agreement[1] < 1 and seen.agreement[2] < 1


@pytest.mark.parametrize("name", ["fixed_depth", "token_choice", "depth_and_width", "custom"])
def test_a_router_that_looks_at_no_later_token_agrees_with_itself(name):
    seen = inspect_text(model_with(EVERY_ROUTER[name]), text(), WINDOW)
    assert seen.agreement == (1.0, 1.0, 1.0)
    assert seen.depths.equal(seen.training_depths)


@pytest.mark.parametrize(
    "name", ["expert_choice", "expert_choice_first_step_too", "depth_and_width"]
)
def test_a_token_runs_a_step_where_its_score_exceeds_the_threshold(name):
    seen = inspect_text(model_with(EVERY_ROUTER[name]), text(), WINDOW)
    compared = 0
    for step, threshold in enumerate(seen.thresholds):
        for token in range(LENGTH):
            score, depth = seen.scores[step, token].item(), int(seen.depths[token])
            if threshold is not None and depth >= step:
                assert (score > threshold) == (depth > step)
                compared += 1
    assert compared >= LENGTH


def test_candidates_alone_have_scores():
    seen = inspect_text(model_with(ROUTERS["expert_choice"]), text(), WINDOW)
    for step in range(3):
        assert seen.scores[step].isnan().equal(seen.depths < step)


def test_the_likeliest_depth_is_the_one_token_choice_takes():
    seen = inspect_text(model_with(ROUTERS["token_choice"]), text(), WINDOW)
    assert (seen.scores.argmax(dim=0) + 1).equal(seen.depths)


@pytest.mark.parametrize("router", EVERY_ROUTER.values(), ids=list(EVERY_ROUTER))
def test_every_assignment_to_an_expert_is_in_a_cell(router):
    seen = inspect_text(model_with(router, with_experts=True), text(), WINDOW)
    for step in range(3):
        ran = int((seen.depths > step).sum())
        assert seen.expert_load[step].sum() == 2 * ran
    assert seen.cell_shares.sum(dim=1).tolist() == pytest.approx(
        [1.0 if share else 0.0 for share in seen.shares]
    )


@pytest.mark.parametrize("sharing", ["sequence", "middle_sequence"])
def test_sequence_schemes_run_every_step(sharing):
    model = small_model(small_config(FixedDepth(), sharing=sharing, block_size=2))
    seen = inspect_text(model, text(), WINDOW)
    assert seen.depths.tolist() == [3] * LENGTH
    assert math.isnan(seen.surprise_correlation)


@torch.no_grad()
def test_steps_of_several_recursions_are_numbered_through():
    early = RecursionConfig(2, "sequence", block_layers=2, prelude_layers=1)
    late = RecursionConfig(3, "cycle", ExpertChoice(alpha=0.7), block_layers=1, coda_layers=1)
    config = replace(plain_config(9), recursion=(early, late), moe=MoEConfig(3, 2))
    model, ids = small_model(config).eval(), text()
    seen, (block,) = inspect_text(model, ids, WINDOW), model.blocks[1]
    assert (seen.steps, seen.num_recursions, len(seen.agreement)) == ((2, 3), 5, 5)
    for begin in range(0, LENGTH, WINDOW):
        part = slice(begin, begin + WINDOW)
        trained, output = model(ids[None, part]), model(ids[None, part], causal_routing=True)
        assert seen.depths_by_recursion[0, part].eq(2).all()
        assert seen.depths_by_recursion[1, part].equal(output.recursions[2].depths[:, 0])
        assert seen.training_depths_by_recursion[1, part].equal(trained.recursions[2].depths[:, 0])
        assert seen.depths[part].equal(output.depths[0] - 2)  # which counts both layers' steps
    ran = [int((seen.depths_by_recursion[1] > step).sum()) for step in range(3)]
    assert seen.shares == pytest.approx([1.0, 1.0, *(count / LENGTH for count in ran)])
    assert sum(seen.depth_shares) == pytest.approx(1) and seen.depth_shares[:2] == (0, 0)
    assert seen.dead_shares[:2] == (0.0, 0.0)
    # Two experts a token in each layer: of the early recursion's two layers, and of the late one's.
    assert seen.expert_load.sum(dim=1).tolist() == [4 * LENGTH, 4 * LENGTH, *(2 * n for n in ran)]
    assert seen.scores[:2].isnan().all() and not seen.scores[2:4].isnan().any()
    assert seen.thresholds[:3] == (None,) * 3 and None not in seen.thresholds[3:]
    assert seen.agreement[:3] == (1.0, 1.0, 1.0) and seen.agreement[4] < 1
    assert block.router.num_recursions == 3


def test_a_plain_decoder_has_one_step():
    seen = inspect_text(small_model(plain_config(3)), text(), WINDOW)
    assert (seen.num_recursions, seen.shares, seen.expert_load) == (1, (1.0,), None)


def test_looking_changes_nothing_and_repeats_itself():
    model = model_with(ROUTERS["random_depth"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seen, again = (inspect_text(model, text(), WINDOW) for _ in range(2))
    assert torch.rand(1) == expected
    assert model.training and "decide" not in vars(model.recursions[0].router)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert seen.training_depths.equal(again.training_depths)


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 1, 2, 2], [1, 2, 3, 4], 0.8944271909999159),  # scipy.stats.spearmanr
        ([3, 1, 2, 2, 1], [0.1, 0.7, 0.2, 0.2, 0.5], -0.9733285267845754),
    ],
)
def test_rank_correlation_gives_ties_their_mean_rank(values, others, expected):
    found = rank_correlation(torch.tensor(values), torch.tensor(others))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "window", "message"),
    [
        ([1, 2, 3], 0, "window=0 must be at least 1"),
        ([1], 4, r"Pass \[t\] with at least 2 tokens"),
        ([1, VOCAB_SIZE], 4, f"vocab_size={VOCAB_SIZE}"),
    ],
)
def test_what_cannot_be_looked_at_is_answered(ids, window, message):
    with pytest.raises(ValueError, match=message):
        inspect_text(small_model(small_config()), torch.tensor(ids), window)
