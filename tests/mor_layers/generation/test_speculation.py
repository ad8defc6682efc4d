"""Drafts change how long decoding takes, and nothing about its result."""

import itertools
from dataclasses import replace

import pytest
import torch

from mor_layers import MoRTransformer, RecursionConfig
from mor_layers.generation import (
    HeadSpeculation,
    IncrementalDecoder,
    Sampling,
    Speculation,
    SpeculativeDecoder,
)
from mor_layers.generation.drafts.head_drafts import HeadDrafts
from mor_layers.generation.sampling import distribution, sample
from mor_layers.models import LatentAttentionConfig, MultiTokenPrediction
from mor_layers.recursion import KVPolicy, StepContext
from mor_layers.selection import Tokens
from tests.mor_layers.generation.test_engine import ALL_ROUTERS, POLICIES, model_for
from tests.mor_layers.small_models import plain_config, random_ids, small_config, small_model
from tests.pairs import pairwise_sweep

PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 7, 4)]


def assert_greedy(model: MoRTransformer, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the most likely one after those before it, by one pass over the whole text."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + tokens]), causal_routing=True).logits
    assert logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


def check(model: MoRTransformer, speculation: Speculation | HeadSpeculation) -> None:
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


def with_heads(model: MoRTransformer, num_heads: int = 3) -> MoRTransformer:
    """The same model with heads of random weights."""
    config = replace(model.config, multi_token_prediction=MultiTokenPrediction(num_heads))
    found = small_model(config)
    found.load_state_dict(model.state_dict(), strict=False)
    return found.eval()


LATENT = LatentAttentionConfig(8, 4, 2, 6)
WITH_HEADS = {
    "expert choice": model_for("expert_choice", "recursive_sharing", "middle_cycle", block_size=2),
    "token choice": model_for("token_choice", "exit_state", "middle_cycle"),
    "one by one": model_for("fixed_depth", "recursion_wise", "middle_sequence"),
    "plain": small_model(plain_config(3)),
    "several recursions": small_model(
        replace(
            plain_config(4),
            recursion=(RecursionConfig(2, "cycle", ALL_ROUTERS["token_choice"], block_layers=1),)
            * 2,
        )
    ),
    "latent": small_model(replace(plain_config(2), num_kv_heads=None, latent_attention=LATENT)),
}


@pytest.mark.parametrize("name", WITH_HEADS)
def test_greedy_tokens_with_drafts_of_heads_are_those_of_full_passes(name: str) -> None:
    model = with_heads(WITH_HEADS[name])
    for num_drafts in (None, 1):
        check(model, HeadSpeculation(num_drafts))


@pytest.mark.parametrize("name", ["expert choice", "latent"])
def test_heads_that_keep_their_rows_draft_what_heads_on_the_whole_text_draft(name: str) -> None:
    """Whatever was drafted and rejected before: some texts are continued by their drafts, some not."""
    model, generator = with_heads(WITH_HEADS[name]), torch.Generator().manual_seed(0)
    texts, size = torch.tensor([0, 2]), model.config.vocab_size
    whole = torch.randint(size, (3, 30), generator=generator)
    seen = list[torch.Tensor]()
    handle = model.norm.register_forward_hook(lambda module, given, states: seen.append(states))
    with torch.no_grad():
        model(whole, causal_routing=True)
        handle.remove()
        states, drafts = seen[0].transpose(0, 1), HeadDrafts(model, 3, 3)
        lengths, counts = torch.zeros(3, dtype=torch.long), torch.tensor([3, 4, 5])
        for chosen in (torch.arange(3), *[texts] * 5):
            begin, most = lengths[chosen], int(counts[chosen].max())
            rows = (begin[:, None] + torch.arange(most)).clamp(max=29)
            at = chosen[:, None], rows
            ends = begin + counts[chosen]
            drafts.append(chosen, whole[at], counts[chosen], states[at], whole[chosen, ends])
            lengths[chosen] = ends
            found = list[torch.Tensor]()

            def choose(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                chances = distribution(model.output(heads), Sampling(1.0))
                return torch.multinomial(chances, 1, generator=generator)[:, 0], chances

            tokens, chances = drafts.draft(chosen, 3, choose)
            for i, text in enumerate(chosen.tolist()):
                found = by_whole_text(model, states[text], whole[text], int(ends[i]), tokens[i])
                torch.testing.assert_close(chances[i], found, rtol=1e-4, atol=1e-6)
            counts = torch.tensor([1, 0, 4]) if lengths[0] % 2 else torch.tensor([3, 0, 2])


def by_whole_text(
    model: MoRTransformer, states: torch.Tensor, ids: torch.Tensor, end: int, drafts: torch.Tensor
) -> torch.Tensor:
    """What each draft behind position `end` is drawn from, by heads that run on the whole text."""
    known, hidden = torch.cat([ids[: end + 1], drafts]), states[:end, None]
    chances = []
    for distance, head in enumerate(model.prediction_heads, start=1):
        embedded = model.embedding(known[distance : distance + end])[:, None]
        hidden = head(hidden, embedded, StepContext(0, Tokens.whole_sequence(end, 1)))
        chances.append(distribution(model.output(hidden[-1]), Sampling(1.0))[0])
    return torch.stack(chances)


def test_heads_that_predict_rightly_save_passes() -> None:
    """A model that always gives the same token, and heads that agree."""
    model = with_heads(small_model(small_config(num_recursions=3)))
    with torch.no_grad():
        model.output.weight.zero_()
    counts = SpeculativeDecoder(model, HeadSpeculation()).generate([[3, 1]], 9).counts
    assert (counts.drafted, counts.accepted) == (6, 6)
    assert (counts.passes, counts.plain_passes) == (2 * 3, 8 * 3)


def test_models_without_enough_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_drafts=None needs as many heads, .* has 0"):
        SpeculativeDecoder(small_model(plain_config(3)), HeadSpeculation())
    with pytest.raises(ValueError, match=r"num_drafts=4 needs as many heads, .* has 3"):
        SpeculativeDecoder(with_heads(small_model(plain_config(3))), HeadSpeculation(4))
    with pytest.raises(ValueError, match="num_drafts=0 must be at least 1"):
        HeadSpeculation(0)


@pytest.mark.parametrize(
    ("policy", "sampling", "num_drafts"),
    [
        ("recursion_wise", Sampling(1.0, seed=1), 2),
        ("recursive_sharing", Sampling(0.8, top_k=3, top_p=0.9, seed=2), 3),
        ("exit_state", Sampling(1.0, top_k=3, seed=5), HeadSpeculation(2)),
        pytest.param(
            "recursion_wise", Sampling(0.9, seed=6), HeadSpeculation(), marks=pytest.mark.full
        ),
        pytest.param("exit_state", Sampling(1.3, min_p=0.1, seed=3), 3, marks=pytest.mark.full),
        pytest.param("sharing_with_update", Sampling(1.0, seed=4), 4, marks=pytest.mark.full),
    ],
)
def test_sampled_texts_have_the_distribution_of_the_model(
    policy: KVPolicy, sampling: Sampling, num_drafts: int | HeadSpeculation
) -> None:
    config = small_config(ALL_ROUTERS["expert_choice"], 3, kv_policy=policy)
    model, prompt, count, draws = small_model(replace(config, vocab_size=4)), [1, 3], 3, 8000
    speculation = num_drafts
    if isinstance(num_drafts, int):
        speculation = Speculation(1, num_drafts)
    else:
        model = with_heads(model)
    expected = chances_of_texts(model, prompt, count, sampling)
    assert expected.sum() == pytest.approx(1.0)
    decoder = SpeculativeDecoder(model, speculation, sampling)
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
