"""Block masks of FlexAttention against the full masks, and attention by one against the other.

Without a GPU, FlexAttention computes its definition in plain PyTorch, and compiles its forward pass.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    RecursionBlock,
    RouterConfig,
    RoutingDecision,
    TokenChoice,
    Tokens,
)
from mor_layers.recursion import attend, begin_step, block_mask, block_masks, causal_mask
from mor_layers.recursion.kv_policies import StepContext
from mor_layers.selection.fused import without_fused_kernels
from tests.mor_layers.selection.test_decision import batches, random_weights, seeds, shares
from tests.mor_layers.small_models import gradients, random_ids, small_config, small_model

POLICIES = ("recursion_wise", "recursive_sharing", "sharing_with_update", "exit_state")
DAILY = {("expert", "recursive_sharing"), ("token", "exit_state")}
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def full_mask(mask: BlockMask) -> Tensor:
    """The mask `[b 1 k m]` that the kernels of FlexAttention would apply."""
    height, width = mask.BLOCK_SIZE
    count, length = mask.seq_lengths
    batch = mask.kv_num_blocks.shape[0]
    index = [torch.arange(n) for n in (batch, count, length)]
    single = mask.mask_mod(
        index[0][:, None, None], torch.zeros(()), index[1][:, None], index[2]
    ).expand(batch, count, length)
    found = torch.zeros(batch, count, length, dtype=torch.bool)
    for j in range(batch):
        for x in range(mask.kv_num_blocks.shape[2]):
            rows = slice(x * height, (x + 1) * height)
            for numbers, indices, is_full in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                assert numbers is not None and indices is not None
                for y in indices[j, 0, x, : int(numbers[j, 0, x])].tolist():
                    columns = slice(y * width, (y + 1) * width)
                    assert not found[j, rows, columns].any(), "a block is listed twice"
                    found[j, rows, columns] = True if is_full else single[j, rows, columns]
    return found[:, None]


def is_near(queries: Tokens, keys: Tokens, window: int | None) -> Tensor:
    """`[b 1 k m]`."""
    apart = queries.positions.T[:, :, None] - keys.positions.T[:, None]
    return (apart <= (10**6 if window is None else window))[:, None]


@given(
    whole=batches(),
    share=shares,
    seed=seeds,
    size=st.integers(1, 5),
    window=st.none() | st.integers(0, 4),
)
def test_blocks_hold_what_the_full_mask_does(
    whole: Tokens, share: float, seed: int, size: int, window: int | None
) -> None:
    decision = RoutingDecision.everything(whole).keep_top(random_weights(whole, seed), share)
    ran = decision.tokens
    for queries, keys in ((ran, whole), (ran, ran), (whole, whole)):
        expected = causal_mask(queries, keys)
        if expected is None:  # rows in order, and padding after them
            continue
        found = full_mask(block_mask(queries, keys, window, size=size))
        assert found.equal(expected & is_near(queries, keys, window))


@given(whole=batches(), share=shares, seed=seeds, size=st.integers(1, 5))
def test_blocks_hold_exited_tokens_as_the_full_mask_does(
    whole: Tokens, share: float, seed: int, size: int
) -> None:
    from mor_layers.recursion import Exited

    decision = RoutingDecision.everything(whole).keep_top(random_weights(whole, seed), share)
    rest = RoutingDecision.everything(whole).rest(decision)
    if rest is None:
        return
    earlier = begin_step("exit_state", 0, whole, None)
    hidden = torch.zeros(*rest.tokens.shape, 1)
    context = begin_step("exit_state", 1, decision.tokens, earlier, Exited(rest.tokens, hidden))
    found = full_mask(block_mask(context.tokens, context.keys, own_row=True, size=size))
    assert context.causal_mask is not None
    assert found.equal(context.causal_mask)


def test_most_blocks_of_a_long_sequence_are_full_or_left_out() -> None:
    """Of 8 blocks of queries and 16 of keys, whose positions are about twice as dense."""
    torch.manual_seed(0)
    whole = Tokens.whole_sequence(2048, 1)
    ran = RoutingDecision.everything(whole).keep_top(torch.randn(2048, 1), 0.5).tokens
    mask = block_mask(ran, whole)
    assert mask.kv_num_blocks.shape == (1, 1, 8)
    assert mask.full_kv_num_blocks is not None
    some, every = (int(x.sum()) for x in (mask.kv_num_blocks, mask.full_kv_num_blocks))
    assert every >= 45  # 56 below the diagonal
    assert some <= 28
    assert some + every <= 8 * 16 - 48


@pytest.fixture
def flex_runs(monkeypatch: Any) -> list[BlockMask]:
    """FlexAttention wherever there is a mask, also backward. Collects the masks."""
    monkeypatch.setattr(block_masks, "runs_flex_attention", lambda device: True)
    monkeypatch.setattr(block_masks, "_BLOCK", 2)
    monkeypatch.setattr(block_masks, "_SMALLEST_HEAD", 1)
    # PyTorch refuses the backward pass on CPUs, for which it has no kernel but a definition.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    used: list[BlockMask] = []
    plain = flex_attention.flex_attention

    def spied(*args: Any, **kwargs: Any) -> Any:
        used.append(kwargs["block_mask"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(flex_attention, "flex_attention", spied)
    return used


def test_attention_by_blocks_equals_masked_attention(flex_runs: list[BlockMask]) -> None:
    torch.manual_seed(0)
    whole = Tokens.whole_sequence(9, 2)
    ran = RoutingDecision.everything(whole).keep_top(torch.randn(9, 2), 0.5).tokens
    shapes = (4, 2, 4, 8), (9, 2, 2, 8), (9, 2, 2, 6)
    given_ = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for mask in (block_mask(ran, whole), causal_mask(ran, whole)):
        out = attend(*given_, mask, scale=0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), given_)])
    assert len(flex_runs) == 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        pytest.param(router, policy, id=f"{name}, {policy}", marks=marks)
        for name, router in (("expert", ExpertChoice(alpha=0.7)), ("token", TokenChoice()))
        for policy in POLICIES
        for marks in [() if (name, policy) in DAILY else pytest.mark.full]
    ],
)
def test_a_model_trains_by_blocks_as_by_masks(
    flex_runs: list[BlockMask], router: RouterConfig, policy: Any
) -> None:
    model = small_model(small_config(router, kv_policy=policy, block_size=2))
    ids = random_ids(2, 9)
    results = []
    for is_plain in (False, True):
        model.zero_grad()
        if is_plain:
            with without_fused_kernels():
                output = model(ids, labels=ids)
        else:
            output = model(ids, labels=ids)
        output.loss.backward()
        results.append((output.loss, gradients(model)))
    # Steps 2 and 3 have a mask, made once for both layers; the others are plainly causal.
    expected = 0 if policy == "recursion_wise" else 4
    assert len(flex_runs) == expected
    assert len({id(mask) for mask in flex_runs}) == expected // 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_documents_and_latent_attention_go_by_blocks(flex_runs: list[BlockMask]) -> None:
    from dataclasses import replace

    from tests.mor_layers.models.test_latent_attention import SIZES

    config: DecoderConfig = replace(
        small_config(ExpertChoice(alpha=0.7), kv_policy="recursive_sharing"),
        num_kv_heads=None,
        latent_attention=SIZES,
    )
    model, ids = small_model(config), random_ids(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    with torch.no_grad():
        found = model(ids, documents=documents).logits
        assert len(flex_runs) == 5  # three steps, prelude and coda
        with without_fused_kernels():
            expected = model(ids, documents=documents).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dropout_small_heads_and_short_keys_stay_with_masks(monkeypatch: Any) -> None:
    monkeypatch.setattr(block_masks, "runs_flex_attention", lambda device: True)
    rows = torch.zeros(129, 1, 2, 16)
    assert block_masks.attends_by_blocks(rows, rows, rows)
    assert not block_masks.attends_by_blocks(rows, rows, rows, dropout=0.1)
    assert not block_masks.attends_by_blocks(rows, rows[:128], rows[:128])
    assert not block_masks.attends_by_blocks(rows[..., :8], rows[..., :8], rows)
    monkeypatch.undo()
    assert not block_masks.attends_by_blocks(rows, rows, rows)  # a CPU


def test_a_context_with_a_mask_of_its_own_keeps_it(flex_runs: list[BlockMask]) -> None:
    class Stored(StepContext):
        causal_mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)  # type: ignore[assignment]

    rows = torch.zeros(3, 1, 1, 4)
    context = Stored(0, Tokens.whole_sequence(3, 1))
    assert context.mask_for(rows, rows, rows) is Stored.causal_mask


@pytest.mark.full
def test_compiled_attention_by_blocks_equals_masked_attention() -> None:
    """With PyTorch's own kernel for CPUs, which leaves out blocks as those for GPUs do."""
    torch.manual_seed(0)
    whole = Tokens.whole_sequence(700, 2)
    ran = RoutingDecision.everything(whole).keep_top(torch.randn(700, 2), 0.5).tokens
    query, key, value = (torch.randn(n, 2, g, 32) for n, g in ((350, 4), (700, 2), (700, 2)))
    with torch.no_grad():
        found = torch.compile(attend)(query, key, value, block_mask(ran, whole))
        expected = attend(query, key, value, causal_mask(ran, whole))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_a_block_compiles_whole_with_block_masks(flex_runs: list[BlockMask]) -> None:
    model = small_model(small_config(ExpertChoice(alpha=0.7), kv_policy="recursive_sharing"))
    (block,) = model.recursions
    assert isinstance(block, RecursionBlock)
    hidden = torch.randn(9, 2, model.config.hidden_size)
    with torch.no_grad():
        found = torch.compile(block, fullgraph=True, backend="eager")(hidden).hidden
        torch.testing.assert_close(found, block(hidden).hidden)


def test_flex_attention_is_tried_before_it_is_used(
    flex_runs: list[BlockMask],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(block_masks, "_BLOCK", 16)
    try_now = block_masks.flex_attention_passes.__wrapped__
    device = torch.device("cpu")
    assert try_now(device) and len(flex_runs) == 1 and "cannot be used" not in caplog.text
    make = block_masks.block_mask
    monkeypatch.setattr(block_masks, "block_mask", lambda *tokens: make(*tokens, window=9))
    assert not try_now(device)
    assert "FlexAttention cannot be used here, and plain PyTorch takes its" in caplog.text
