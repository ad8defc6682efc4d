"""Drafts change how long decoding takes, and nothing about its result."""

import itertools
from dataclasses import replace

import pytest
import torch

from mor_layers import MoRTransformer
from mor_layers.generation import IncrementalDecoder, Sampling, Speculation, SpeculativeDecoder
from mor_layers.generation.sampling import distribution, sample
from mor_layers.recursion import KVPolicy
from tests.mor_layers.generation.test_engine import ALL_ROUTERS, POLICIES, model_for
from tests.mor_layers.small_models import plain_config, random_ids, small_config, small_model
from tests.pairs import pairwise_sweep

PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 7, 4)]


def assert_greedy(model: MoRTransformer, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the most likely one after those before it, by one pass over the whole text."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + tokens]), causal_routing=True).logits
    assert logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


def check(model: MoRTransformer, speculation: Speculation) -> None:
    found = SpeculativeDecoder(model, speculation).generate(PROMPTS, 10)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        assert len(tokens) == 10
        assert_greedy(model, prompt, tokens)


@pytest.mark.parametrize(
    ("router", "policy", "depth", "num_drafts"),
    pairwise_sweep(itertools.product(ALL_ROUTERS, POLICIES, (1, 2), (1, 3, 5))),
)
def test_greedy_tokens_are_those_of_full_passes(
    router: str, policy: KVPolicy, depth: int, num_drafts: int
) -> None:
    model = model_for(router, policy, "middle_cycle", block_size=2)
    check(model, Speculation(depth, num_drafts))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(small_config(num_recursions=2, ends=(0, 2)), id="ends"),
        pytest.param(
            small_config(ALL_ROUTERS["token_choice"], share_norms=False), id="norms of each step"
        ),
    ],
)
def test_other_models(config) -> None:
    check(small_model(config), Speculation(1, 4))


def chances_of_texts(
    model: MoRTransformer, prompt: list[int], count: int, sampling: Sampling
) -> torch.Tensor:
    """The exact probability of each continuation of `count` tokens, by full passes over all of them."""
    size = model.config.vocab_size
    texts = torch.tensor([[*prompt, *new] for new in itertools.product(range(size), repeat=count)])
    with torch.no_grad():
        logits = model.eval()(texts, causal_routing=True).logits
    total = torch.ones(len(texts), dtype=torch.float64)
    for at in range(len(prompt), texts.shape[1]):
        total *= distribution(logits[:, at - 1], sampling).gather(1, texts[:, at, None])[:, 0]
    return total


@pytest.mark.parametrize(
    ("policy", "sampling", "num_drafts"),
    [
        ("recursion_wise", Sampling(1.0, seed=1), 2),
        ("recursive_sharing", Sampling(0.8, top_k=3, top_p=0.9, seed=2), 3),
        pytest.param("exit_state", Sampling(1.3, min_p=0.1, seed=3), 3, marks=pytest.mark.full),
        pytest.param("sharing_with_update", Sampling(1.0, seed=4), 4, marks=pytest.mark.full),
    ],
)
def test_sampled_texts_have_the_distribution_of_the_model(
    policy: KVPolicy, sampling: Sampling, num_drafts: int
) -> None:
    config = small_config(ALL_ROUTERS["expert_choice"], 3, kv_policy=policy)
    model, prompt, count, draws = small_model(replace(config, vocab_size=4)), [1, 3], 3, 8000
    expected = chances_of_texts(model, prompt, count, sampling)
    assert expected.sum() == pytest.approx(1.0)
    decoder = SpeculativeDecoder(model, Speculation(1, num_drafts), sampling)
    found = decoder.generate([prompt] * draws, count)
    assert 0.2 < found.counts.acceptance_rate < 0.98, "drafts must differ from what verifies them"
    number = (torch.tensor(found.tokens) * 4 ** torch.arange(count - 1, -1, -1)).sum(dim=1)
    seen = number.bincount(minlength=4**count)
    assert not seen[expected == 0].any()
    # Texts that are expected fewer than five times are one cell of the chi-square statistic.
    is_rare = expected * draws < 5
    cells = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]]) * draws
    counts = torch.cat([seen[~is_rare], seen[is_rare].sum()[None]])
    has_cell = cells > 0
    statistic = ((counts - cells)[has_cell] ** 2 / cells[has_cell]).sum()
    freedom = int(has_cell.sum()) - 1
    assert freedom > 8
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_the_distribution_is_the_one_that_tokens_are_sampled_from() -> None:
    logits, draws = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)), 20000
    for sampling in (
        Sampling(0.0),
        Sampling(0.7),
        Sampling(1.0, top_k=4),
        Sampling(1.0, top_p=0.6),
        Sampling(1.5, top_k=6, top_p=0.8, min_p=0.1),
    ):
        drawn = sample(logits.expand(draws, -1), [sampling] * draws, range(draws))
        shares, expected = drawn.bincount(minlength=9) / draws, distribution(logits, sampling)[0]
        assert torch.equal(shares > 0, expected > 0)
        assert (shares - expected).abs().max() < 0.015


def test_texts_end_at_stop_tokens_and_at_their_length() -> None:
    model = model_for("expert_choice", "recursion_wise", "middle_cycle")
    plain = SpeculativeDecoder(model, Speculation(1, 1)).generate(PROMPTS, 9).tokens
    for prompt, text in zip(PROMPTS, plain, strict=True):
        assert_greedy(model, prompt, text)
    stop = plain[0][4]
    found = SpeculativeDecoder(model, Speculation(1, 4)).generate(PROMPTS, 9, [stop])
    ends = [text.index(stop) + 1 if stop in text else 9 for text in plain]
    assert found.tokens == [text[:end] for text, end in zip(plain, ends, strict=True)]


def test_counts_say_what_was_saved() -> None:
    """With weights whose second and third step change nothing, every draft is right."""
    model = small_model(small_config(num_recursions=3, ends=(1, 0)))
    for layer in model.recursions[0].layers.layers:  # type: ignore[union-attr]
        layer.attention.output.weight.data.zero_()
        layer.mlp.down.weight.data.zero_()
    counts = SpeculativeDecoder(model, Speculation(1, 4)).generate([[3, 1]], 9).counts
    assert (counts.drafted, counts.accepted, counts.acceptance_rate) == (8, 8, 1.0)
    assert (counts.passes, counts.plain_passes) == (2 * (4 + 2), 8 * 3)
    assert counts.token_steps == counts.plain_token_steps == 8 * 3


def test_rejected_tokens_leave_the_caches() -> None:
    model = model_for("fixed_depth", "recursion_wise", "middle_cycle")
    decoder, plain = IncrementalDecoder(model, 2), IncrementalDecoder(model, 2)
    ids = random_ids(2, 20)
    decoder.extend(ids)
    decoder.keep(torch.tensor([7, 12]))
    plain.extend(ids[:, :12], torch.arange(12) < torch.tensor([[7], [12]]))
    assert decoder.caches.num_bytes_in_use == plain.caches.num_bytes_in_use
    assert torch.equal(decoder.is_token, plain.is_token)
    following = random_ids(2, 3, seed=9)
    torch.testing.assert_close(decoder.extend(following), plain.extend(following))


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (plain_config(3), {}, "this model has none"),
        (small_config(sharing="sequence", block_size=2), {}, "this model has none"),
        (small_config(), {"speculation": Speculation(3)}, "must be below the 3 steps"),
        (small_config(), {"sampling": Sampling(frequency_penalty=1.0)}, "penalties and logit_bias"),
    ],
)
def test_what_cannot_be_drafted_is_refused(config, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SpeculativeDecoder(small_model(config), **{"speculation": Speculation(), **options})
    with pytest.raises(ValueError, match="num_drafts=0 must be at least 1"):
        Speculation(num_drafts=0)
    with pytest.raises(ValueError, match="each must be at least 1"):
        SpeculativeDecoder(small_model(small_config()), Speculation()).generate([[1], []], 3)
