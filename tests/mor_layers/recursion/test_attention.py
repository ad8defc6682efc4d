"""What attention sees, per KV policy, against loops over queries, heads and keys."""

import pytest
import torch
from hypothesis import given

from mor_layers import ExpertChoice, RecursionBlock, RoutingDecision, Tokens
from mor_layers.models import DecoderStack
from mor_layers.recursion import attend, begin_step, causal_mask
from tests.mor_layers.selection.test_decision import batches, random_weights, seeds, shares
from tests.mor_layers.small_models import KV_POLICIES, columns, random_states, small_config
from tests.oracles import loops as reference


def heads(tokens: int, batch: int, count: int, size: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, batch, count, size, generator=generator).requires_grad_()


@pytest.mark.parametrize(("n", "g"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([0], [0]), ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([1, 4, 6], [0, 1, 2, 4, 5, 6, 7])],
)
def test_attention_equals_loops_with_its_gradients(queries, keys, n, g):
    q, k, v = (
        heads(len(queries), 2, n),
        heads(len(keys), 2, g, seed=1),
        heads(len(keys), 2, g, seed=2),
    )
    key_tokens = Tokens(columns(keys, keys), 8)
    query_tokens = key_tokens if queries == keys else Tokens(columns(queries, queries), 8)
    mask = causal_mask(query_tokens, key_tokens)
    assert (mask is None) == (queries == keys)
    fast = attend(q, k, v, mask)
    slow = [reference.attention(q[:, j], queries, k[:, j], v[:, j], keys) for j in range(2)]
    slow = torch.stack(slow, dim=1)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    seed = torch.randn(fast.shape, generator=torch.Generator().manual_seed(3))
    grads = [torch.autograd.grad(out, (q, k, v), seed) for out in (fast, slow)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@given(whole=batches(), share=shares, seed=seeds)
def test_a_query_sees_keys_before_it_in_its_document_and_no_padding(whole, share, seed):
    decision = RoutingDecision.everything(whole).keep_top(random_weights(whole, seed), share)
    ran = decision.tokens
    for queries, keys in ((whole, whole), (ran, whole), (ran, ran)):
        mask = causal_mask(queries, keys)
        if mask is None:
            assert queries is keys
            mask = torch.ones(keys.shape[0], keys.shape[0], dtype=torch.bool).tril()
            mask = mask.expand(keys.shape[1], 1, -1, -1)
        for j in range(whole.shape[1]):
            for i in range(queries.shape[0]):
                if queries.is_padding is not None and queries.is_padding[i, j]:
                    assert mask[j, 0, i].any(), "padding must see something, or softmax gives nan"
                    continue
                for m in range(keys.shape[0]):
                    sees = bool(keys.positions[m, j] <= queries.positions[i, j])
                    if keys.is_padding is not None:
                        sees &= not keys.is_padding[m, j]
                    if keys.documents is not None:
                        sees &= bool(keys.documents[m, j] == queries.documents[i, j])
                    assert bool(mask[j, 0, i, m]) == sees


def test_plain_causal_attention_needs_no_mask():
    tokens = Tokens.whole_sequence(5, 2)
    assert causal_mask(tokens, tokens) is None
    ragged = RoutingDecision.everything(tokens).keep_where(
        columns([1, 0, 1, 0, 1], [0, 0, 0, 1, 0]).bool()
    )
    assert causal_mask(ragged.tokens, ragged.tokens) is None


def three_steps(first_share: float = 0.8) -> list[Tokens]:
    """Ever fewer tokens of two sequences, the first with padding in front."""
    is_padding = columns([1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]).bool()
    decision = RoutingDecision.everything(Tokens.whole_sequence(7, 2, is_padding=is_padding))
    steps = []
    for step, share in enumerate((first_share, 0.5, 0.2)):
        decision = decision.keep_top(random_weights(decision.tokens, step), share)
        steps.append(decision.tokens)
    return steps


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_each_policy_shows_the_rows_of_its_definition(policy):
    steps, context = three_steps(), None
    memories: list[reference.Memory] = [{}, {}]
    for step, tokens in enumerate(steps):
        context = begin_step(policy, step, tokens, context)
        assert context.projects_keys == (step == 0 or policy != "recursive_sharing")
        for layer in range(2):
            # A key tells step, layer, sequence and position; a value is the key's negative.
            key = tokens.positions[..., None, None] + 100.0 * step + 1000 * layer
            given = (key, -key) if context.projects_keys else (None, None)
            keys, values = context.exchange(layer, *given)
            assert torch.equal(values, -keys)
            seen_tokens = context.keys
            for j in range(2):
                real = [
                    i
                    for i in range(tokens.shape[0])
                    if tokens.is_padding is None or not tokens.is_padding[i, j]
                ]
                fresh = {int(tokens.positions[i, j]): (key[i, j], -key[i, j]) for i in real}
                expected = reference.seen_keys(policy, step, layer, fresh, memories[j])
                got = {
                    int(seen_tokens.positions[m, j]): float(keys[m, j])
                    for m in range(len(keys))
                    if not seen_tokens.is_padding[m, j]
                }
                assert got == {position: float(k) for position, (k, _) in expected.items()}


def projected_rows(policy: str) -> list[dict[str, int]]:
    """Rows that each step's projections compute."""
    config = small_config()
    stack = DecoderStack(config, 1)
    router = ExpertChoice(capacity_factors=(1.0, 0.5, 0.25)).build(config.hidden_size, 3)
    block = RecursionBlock(stack, router, policy)
    rows: list[dict[str, int]] = []
    names = ("query", "key", "value", "output")
    for name in names:
        module = getattr(stack.layers[0].attention, name)
        module.register_forward_hook(
            lambda _, args, __, name=name: rows[-1].__setitem__(name, args[0].shape[0])
        )
    stack.register_forward_pre_hook(lambda *_: rows.append(dict.fromkeys(names, 0)))
    block(random_states(8, 2))
    return rows


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_only_active_tokens_are_projected_and_shared_keys_only_once(policy):
    for step, (rows, active) in enumerate(zip(projected_rows(policy), (8, 4, 2), strict=True)):
        fresh_keys = 0 if policy == "recursive_sharing" and step else active
        assert rows == {
            "query": active, "key": fresh_keys, "value": fresh_keys, "output": active,
        }  # fmt: skip


def test_an_update_starts_again_from_the_first_steps_rows():
    whole = Tokens.whole_sequence(4, 1)
    first = begin_step("sharing_with_update", 0, whole, None)
    key = torch.zeros(4, 1, 1, 1)
    first.exchange(0, key, key)
    two = RoutingDecision.everything(whole).keep_where(columns([0, 1, 1, 0]).bool())
    second = begin_step("sharing_with_update", 1, two.tokens, first)
    keys, _ = second.exchange(0, torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    assert keys.flatten().tolist() == [0, 1, 1, 0]
    one = two.keep_where(columns([0, 1]).bool())
    third = begin_step("sharing_with_update", 2, one.tokens, second)
    keys, _ = third.exchange(0, torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 2.0))
    assert keys.flatten().tolist() == [0, 0, 2, 0]
