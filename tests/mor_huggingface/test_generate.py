"""`generate` with our caches gives what it gives without; what has no exact answer is refused."""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from mor_huggingface import MoRCache, MoRConfig, MoRForCausalLM
from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from tests.mor_layers.generation.test_engine import ALL_ROUTERS, POLICIES
from tests.mor_layers.small_models import VOCAB_SIZE, random_ids, small_config, small_model

SETTINGS = {
    "greedy": {"do_sample": False},
    "samples": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "prompt in chunks": {"do_sample": False, "prefill_chunk_size": 3},
}
SAMPLE = [
    ("expert_choice_first_step_too", "exit_state", "cycle"),
    ("token_choice", "sharing_with_update", "middle_cycle"),
    ("random_depth", "recursion_wise", "cycle"),
    ("depth_and_width", "recursive_sharing", "middle_cycle"),
]


def wrapped(router: str, policy: str, sharing: str = "middle_cycle", seed: int = 0):
    config = small_config(ALL_ROUTERS[router], 3, sharing, policy, block_size=2)
    model = MoRForCausalLM(MoRConfig.from_decoder(config)).eval()
    model.model.load_state_dict(small_model(config, seed).state_dict())
    return model


def padded(lengths: tuple[int, ...] = (9, 4, 1)):
    """Prompts and their mask, filled up on the left."""
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return random_ids(len(lengths), width) * mask, mask.long()


def generate(model, ids, mask, settings, use_cache):
    if not use_cache:
        settings = {n: v for n, v in settings.items() if n != "prefill_chunk_size"}
    torch.manual_seed(3)
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=7,
        eos_token_id=VOCAB_SIZE - 1,
        pad_token_id=0,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


def compare(model, settings) -> None:
    ids, mask = padded()
    plain, cached = (generate(model, ids, mask, settings, use) for use in (False, True))
    assert torch.equal(plain.sequences, cached.sequences)
    for got, wanted in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert isinstance(cached.cache, MoRCache) and plain.cache is None


@pytest.mark.parametrize(("router", "policy", "sharing"), SAMPLE)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cache_changes_nothing(name, router, policy, sharing) -> None:
    compare(wrapped(router, policy, sharing), SETTINGS[name])


@pytest.mark.parametrize("name", ["beams", "prompt in chunks"])
def test_a_cache_changes_nothing_with_several_recursions(name) -> None:
    recursions = (
        RecursionConfig(2, "cycle", ExpertChoice(), "exit_state", block_layers=1),
        RecursionConfig(2, "middle_cycle", TokenChoice(), "recursive_sharing", block_layers=1),
    )
    config = replace(small_config(), num_unrolled_layers=6, recursion=recursions)
    model = MoRForCausalLM(MoRConfig.from_decoder(config)).eval()
    model.model.load_state_dict(small_model(config).state_dict())
    compare(model, SETTINGS[name])


@pytest.mark.full
@pytest.mark.parametrize(
    ("router", "policy", "sharing"),
    list(itertools.product(ALL_ROUTERS, POLICIES, ("cycle", "middle_cycle"))),
)
def test_a_cache_changes_nothing_anywhere(router, policy, sharing) -> None:
    for settings in SETTINGS.values():
        compare(wrapped(router, policy, sharing), settings)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("router", "policy", "sharing"), SAMPLE)
def test_padding_on_the_left_changes_nothing(router, policy, sharing, use_cache) -> None:
    model = wrapped(router, policy, sharing)
    ids, mask = padded()
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, own, sequence in zip(ids, mask, together, strict=True):
        alone = model.generate(row[None, own == 1], **options)
        assert torch.equal(alone[0, int(own.sum()) :], sequence[len(own) :])


@pytest.mark.parametrize(("router", "policy", "sharing"), SAMPLE)
@torch.no_grad()
def test_forward_in_parts_equals_forward_at_once(router, policy, sharing) -> None:
    model = wrapped(router, policy, sharing)
    ids, mask = padded((12, 7))
    expected = model(ids, mask).logits
    cache, parts = None, []
    for start, end in ((0, 6), (6, 7), (7, 12)):
        output = model(ids[:, start:end], mask[:, :end], cache=cache, use_cache=True)
        cache, parts = output.cache, [*parts, output.logits]
    got = torch.cat(parts, dim=1)[mask == 1]
    torch.testing.assert_close(got, expected[mask == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("router", "policy", "sharing"), SAMPLE)
def test_drafts_are_taken_back(router, policy, sharing) -> None:
    model, ids = wrapped(router, policy, sharing), random_ids(1, 12)
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **options)
    other = wrapped("fixed_depth", "recursion_wise", seed=1)
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": other}):
        assert torch.equal(model.generate(ids, **options, **draft), expected)


@torch.no_grad()
def test_a_prompt_that_several_continue_is_computed_once() -> None:
    model = wrapped("expert_choice", "exit_state")
    prompt, ids = random_ids(1, 8), random_ids(1, 12, seed=4)
    ids[:, :8] = prompt
    held = model(prompt, use_cache=True).cache
    options = {"max_new_tokens": 4, "do_sample": False}
    for _ in range(2):
        got = model.generate(ids, cache=deepcopy(held), **options)
        assert torch.equal(got, model.generate(ids, use_cache=False, **options))
    assert held.get_seq_length() == 8


def test_what_a_cache_cannot_do_is_refused() -> None:
    model, ids = wrapped("token_choice", "recursion_wise"), random_ids(1, 4)
    with pytest.raises(ValueError, match="has no gradients"):
        model(ids, use_cache=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match="Leave out labels"):
            model(ids, labels=ids, use_cache=True)
        with pytest.raises(ValueError, match="DynamicCache cannot store the rows"):
            model(ids, cache=DynamicCache())
        with pytest.raises(ValueError, match="needs evaluation mode"):
            model.train()(ids, use_cache=True)
        model.eval()
        cache = model(ids, use_cache=True).cache
        with pytest.raises(ValueError, match=r"must be \(1, 5\)"):
            model(ids[:, :1], torch.ones(1, 1), cache=cache)
        with pytest.raises(ValueError, match="differs from the previous one"):
            model(ids[:, :1], torch.tensor([[0, 1, 1, 1, 1]]), cache=cache)
        with pytest.raises(ValueError, match="takes tokens, not the keys"):
            cache.update(None, None, 0)
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match="cannot store the rows of recursion steps"):
            model.generate(ids, max_new_tokens=2, cache_implementation=kind)
