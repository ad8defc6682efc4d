"""Megatron's static inference context with a RecursionLayer: as a full causal forward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from mor_layers import ExpertChoice
from mor_layers.layers import NormModulation
from mor_layers.recursion import HistoryInjection, HyperConnections, KVPolicy
from mor_megatron import causal_routing
from mor_megatron.checkpoints import load_tensors
from mor_megatron.checkpoints.weights import megatron_tensors
from tests.distributed import megatron_setup as setup
from tests.distributed.checkpoints.test_generation import (
    POLICIES,
    ROUTERS,
    decoder_config,
    torch_model,
)
from tests.distributed.checkpoints.test_weights import gpt
from tests.distributed.pool import WorkerPool

LENGTH, PROMPT, BATCH = 14, 8, 3
SAMPLE = {
    ("expert", "recursion_wise", 1),
    ("token", "sharing_with_update", 2),
    ("expert", "recursive_sharing", 2),
    ("depth and width", "exit_state", 1),
}


def differences(
    router: str, policy: KVPolicy, tp: int, ends: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A prompt at once, then token by token, twice with the same context."""
    setup.initialize(tp=tp)
    config = decoder_config(router, policy, with_experts=False)
    config = replace(config, recursion=replace(config.recursion, **(ends or {})))
    model = gpt(config, sequence_parallel=False)
    load_tensors([model], megatron_tensors(torch_model(config).state_dict(), config))
    memory = StaticInferenceContext(BATCH + 2, LENGTH + 3)
    found, depths = [], set()
    for turn in range(2):
        generator = torch.Generator().manual_seed(turn)
        ids = torch.randint(64, (BATCH, LENGTH), generator=generator)
        positions = torch.arange(LENGTH).expand_as(ids)
        with torch.no_grad(), causal_routing(model):
            expected = model(ids, positions, None)
        depths |= set(torch_model(config)(ids, causal_routing=True).depths.flatten().tolist())
        memory.reset()
        logits = []
        for begin, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))]:
            with torch.no_grad():
                now = slice(begin, end)
                logits.append(model(ids[:, now], positions[:, now], None, inference_context=memory))
            memory.sequence_len_offset = end
        found.append((torch.cat(logits, dim=1) - expected).abs().max().item())
    return {"logits": max(found), "depths": depths, "keys": set(memory.key_value_memory_dict)}


@pytest.mark.parametrize(
    ("router", "policy", "tp"),
    [
        pytest.param(
            router, policy, tp, marks=() if (router, policy, tp) in SAMPLE else pytest.mark.full
        )
        for router in ROUTERS
        for policy in POLICIES
        for tp in (1, 2)
    ],
)
def test_generation_equals_the_full_forward_pass(
    pool: WorkerPool, router: str, policy: KVPolicy, tp: int
) -> None:
    for found in pool.run(differences, tp, router=router, policy=policy, tp=tp):
        assert found["logits"] < 1e-5
        assert len(found["depths"]) > 1
        steps = {1} if policy == "recursive_sharing" else {1, 2, 3}
        rows = {1, 8} | {1 + 2 * (step - 1) + layer for step in steps for layer in (1, 2)}
        assert {key for key in found["keys"] if isinstance(key, int)} == rows


def test_a_long_prelude_and_residual_streams(pool: WorkerPool) -> None:
    ends = {"prelude_layers": 2, "coda_layers": 0, "hyper_connections": HyperConnections(2)}
    settings = {"router": "token", "policy": "recursion_wise", "ends": ends}
    for found in pool.run(differences, 2, tp=2, **settings):
        assert found["logits"] < 1e-5
        assert {key for key in found["keys"] if isinstance(key, int)} == set(range(1, 9))


def test_history_and_modulated_norms(pool: WorkerPool) -> None:
    helps = {"history": HistoryInjection(1), "norm_modulation": NormModulation(3)}
    settings = {"router": "token", "policy": "recursive_sharing", "ends": helps}
    for found in pool.run(differences, 2, tp=2, **settings):
        assert found["logits"] < 1e-5


def test_layers_that_route_by_themselves(pool: WorkerPool) -> None:
    router = ExpertChoice(capacity_factors=(0.5,), alpha=1.0, combine="residual")
    changes = {
        "num_recursions": 1,
        "sharing": "middle_sequence",
        "kv_policy": "recursion_wise",
        "router": router,
        "anchor_every": 3,
        "depth_balance": 0.5,
    }
    settings = {"router": "token", "policy": "recursive_sharing", "ends": changes}
    for found in pool.run(differences, 2, tp=2, **settings):
        assert found["logits"] < 1e-5
        assert len(found["depths"]) > 1


def refusals() -> list[str]:
    setup.initialize(tp=2)
    config = decoder_config("expert", "recursion_wise", with_experts=False)
    paged = InferenceConfig(max_sequence_length=64, buffer_size_gb=0.01, block_size_tokens=16)
    messages = []
    for sequence_parallel, memory in (
        (True, StaticInferenceContext(1, 8)),
        (False, StaticInferenceContext(1, 3)),
        (False, DynamicInferenceContext(setup.tiny_config(), paged)),
    ):
        model = gpt(config, sequence_parallel)
        layer = model.decoder.layers[1]
        hidden = torch.zeros(4 // (1 + sequence_parallel), 1, 32)
        with pytest.raises(ValueError, match=r"parallel|inference context|Static") as caught:
            layer(hidden, inference_context=memory)
        messages.append(str(caught.value))
    return messages


def test_what_cannot_be_generated_with_is_refused(pool: WorkerPool) -> None:
    spread, small, dynamic = pool.run(refusals, 2)[0]
    assert "sequence_parallel=True" in spread and "DepthBatchingEngine" in spread
    assert "4 tokens exceed the inference context" in small and "max_sequence_length=3" in small
    assert "not with a DynamicInferenceContext" in dynamic and "DepthBatchingEngine" in dynamic
