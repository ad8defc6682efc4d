"""Multi-latent attention of the torch core: its arithmetic, its cost, generation from latent rows."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mor_layers import DecoderConfig, MoEConfig, MoRTransformer, RecursionConfig, Relaxation
from mor_layers.costs import account
from mor_layers.generation import CacheSettings, Request
from mor_layers.generation.cache import Caches
from mor_layers.models import LatentAttentionConfig
from mor_layers.models.latent_attention import LatentAttention
from mor_layers.models.rotary import Rotary
from mor_layers.recursion import KV_POLICIES, StepContext
from mor_layers.selection import Tokens
from mor_layers.weights import recursive_weights, unrolled_weights
from tests.mor_layers.costs.test_accounting import BATCH, measure
from tests.mor_layers.generation.served import Recorder, assert_exact, prompt, serve
from tests.mor_layers.generation.test_engine import ALL_ROUTERS
from tests.mor_layers.small_models import (
    random_ids,
    random_states,
    randomized,
    small_config,
    small_model,
)
from tests.pairs import sweep

SIZES = LatentAttentionConfig(
    kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=2, q_lora_rank=7
)
WITHOUT_QUERY_ROWS = replace(SIZES, q_lora_rank=None)


def latent_config(router: str, policy: str, **changes: Any) -> DecoderConfig:
    config = small_config(ALL_ROUTERS[router], 3, kv_policy=policy, block_size=2)  # type: ignore[arg-type]
    return replace(config, num_kv_heads=None, latent_attention=SIZES, **changes)


@pytest.mark.parametrize("sizes", [SIZES, WITHOUT_QUERY_ROWS])
def test_a_layer_is_what_the_paper_says(sizes: LatentAttentionConfig) -> None:
    heads, length, width = 3, 5, 6

    def make(name: str, into: int, out: int) -> torch.nn.Linear:
        assert name == "output"
        return torch.nn.Linear(into, out, bias=False)

    layer = randomized(LatentAttention(sizes, 0, width, heads, 1e-5, make)).double()
    hidden = random_states(length, 1, width).double().detach()
    positions = torch.tensor([0, 2, 3, 7, 9])[:, None]  # of selected tokens
    tokens = Tokens(positions, 12)
    rotary = Rotary.at(positions, sizes.qk_rope_head_dim, 10000.0, torch.float64)
    found = layer(hidden, StepContext(1, tokens), rotary)[:, 0]
    expected = _by_hand(layer, hidden[:, 0], positions[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # of the angles in fp32


def _by_hand(layer: LatentAttention, hidden: Tensor, positions: Tensor) -> Tensor:
    sizes, weights = layer.sizes, dict(layer.named_parameters())
    nope, rope, value_size = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim

    def norm(row: Tensor, weight: Tensor) -> Tensor:
        return row / (row.square().mean() + 1e-5).sqrt() * weight

    def turned(part: Tensor, position: Tensor) -> Tensor:
        """Neighbours as complex numbers, turned by an angle for each; real parts come first."""
        pairs = torch.complex(part[::2], part[1::2])
        angles = position * 10000.0 ** -(torch.arange(len(pairs)) / len(pairs)).float()
        turned = pairs * torch.polar(torch.ones_like(angles), angles)  # fp32, as in the layer
        return torch.cat([turned.real, turned.imag]).double()

    rows, queries = [], []
    for token, position in zip(hidden, positions, strict=True):
        down = weights["kv_down.weight"] @ token
        latent = norm(down[: sizes.kv_lora_rank], weights["kv_norm.weight"])
        rows.append((latent, turned(down[sizes.kv_lora_rank :], position)))
        if sizes.q_lora_rank is not None:
            token = norm(weights["query_down.weight"] @ token, weights["query_norm.weight"])
        queries.append((weights["query_up.weight"] @ token).view(-1, nope + rope))
    outputs = []
    for index, (query, position) in enumerate(zip(queries, positions, strict=True)):
        heads = []
        for head, own in enumerate(query):
            raised = weights["kv_up.weight"].view(len(query), nope + value_size, -1)[head]
            keys = [torch.cat([(raised @ c)[:nope], r]) for c, r in rows[: index + 1]]
            values = [(raised @ c)[nope:] for c, _ in rows[: index + 1]]
            own = torch.cat([own[:nope], turned(own[nope:], position)])
            scores = torch.stack([own @ key for key in keys]) / (nope + rope) ** 0.5
            heads.append(scores.softmax(0) @ torch.stack(values))
        outputs.append(weights["output.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


DECODED = list(itertools.product(ALL_ROUTERS, KV_POLICIES, ("query rows", "no query rows")))
DAILY = [
    ("expert_choice", "recursion_wise", "query rows"),
    ("token_choice", "recursive_sharing", "no query rows"),
    ("depth_and_width", "exit_state", "query rows"),
    ("random_depth", "sharing_with_update", "no query rows"),
]


@pytest.mark.parametrize(("router", "policy", "queries"), sweep(DECODED, DAILY))
def test_decoding_from_latent_rows_equals_the_full_forward_pass(
    router: str, policy: str, queries: str
) -> None:
    sizes = SIZES if queries == "query rows" else WITHOUT_QUERY_ROWS
    model = small_model(replace(latent_config(router, policy), latent_attention=sizes))
    request = Request(prompt(9), 5)
    in_company = Recorder(model, chunk_size=4)
    for seed, length in enumerate((1, 6, 3), start=10):
        in_company.submit(Request(prompt(length, seed), 4))
        in_company.step()
    number = in_company.submit(request)
    served = [
        *serve(model, [request]),
        *serve(model, [request], chunk_size=1),
        in_company.finish()[number],
    ]
    for each in served:
        assert_exact(model, request, each)


def test_caches_keep_a_latent_row_and_a_rotary_part() -> None:
    model = small_model(latent_config("expert_choice", "recursive_sharing"))
    caches = Caches(model, CacheSettings(1 << 16, num_slots=2, page_size=4), 2, 2)
    row = SIZES.kv_lora_rank + SIZES.qk_rope_head_dim
    for arena in (caches.outer, caches.inner):
        assert arena.num_bytes == arena.data.shape[0] * arena.data.shape[1] * row * 4
    cost = account(model.config, 11)
    assert cost.kv_bytes(4) == 11 * row * 4 * (1 + 1 + 2)  # prelude, coda, and a block's one step


@pytest.mark.parametrize("is_int8", [False, True])
def test_rows_of_eight_bits(is_int8: bool) -> None:
    model = small_model(latent_config("fixed_depth", "recursion_wise"))
    request = Request(prompt(9), 1)
    recorder = Recorder(model, is_int8=is_int8)
    recorder.submit(request)
    (logits,) = recorder.finish()[0].logits
    expected = model(torch.tensor([request.ids])).logits[0, -1]
    difference = (logits - expected).abs().max().item()
    assert difference < (0.1 if is_int8 else 1e-4) and (difference > 1e-4) == is_int8


@pytest.mark.parametrize(
    ("router", "policy", "has_experts"),
    sweep(
        itertools.product(("expert_choice", "fixed_depth"), KV_POLICIES, (False, True)),
        [
            ("expert_choice", "recursive_sharing", False),
            ("expert_choice", "exit_state", True),
            ("fixed_depth", "sharing_with_update", True),
        ],
    ),
)
def test_costs_are_what_a_run_takes(router: str, policy: str, has_experts: bool) -> None:
    config = latent_config(router, policy)
    if has_experts:
        config = replace(config, latent_attention=WITHOUT_QUERY_ROWS, moe=MoEConfig(4))
    model, length = small_model(config), 11
    measured, cost = measure(model, random_ids(BATCH, length)), account(config, length)
    assert measured.forward == BATCH * cost.forward.total
    assert measured.training == BATCH * cost.training.total
    assert cost.parameters.total == sum(p.numel() for p in model.parameters())


def test_a_recursion_of_fixed_depth_is_the_plain_decoder() -> None:
    relaxation = Relaxation(2, projections=("output", "gate"))
    recursion = RecursionConfig(3, relaxation=relaxation)
    config = replace(latent_config("fixed_depth", "recursion_wise"), recursion=recursion)
    model, ids = small_model(config), random_ids(2, 9)
    plain_settings, weights = unrolled_weights(model.state_dict(), config)
    plain = MoRTransformer(plain_settings)
    plain.load_state_dict(dict(weights))
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    started, tensors = recursive_weights(
        plain.state_dict(), plain_settings, RecursionConfig(3), "average"
    )
    MoRTransformer(started).load_state_dict(dict(tensors))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qk_norm": True}, "qk_norm=True is not a setting of latent_attention"),
        ({"head_dim": 8}, "head_dim=8 is not a setting"),
        ({"num_kv_heads": 1}, "num_kv_heads=1 is not a setting"),
        (
            {"recursion": RecursionConfig(3, relaxation=Relaxation(2, projections=("key",)))},
            "projects in two stages",
        ),
        (
            {"recursion": RecursionConfig(3, own_per_step=("attention",))},
            "cannot have latent_attention of each step",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(latent_config("fixed_depth", "recursion_wise"), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1, or None"),
        ({"qk_rope_head_dim": 3}, "must be even"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(SIZES, **changes)
