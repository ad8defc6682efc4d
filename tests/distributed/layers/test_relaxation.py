"""Deltas of single steps in Megatron: where they start, what trains them, what is refused."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from mor_layers import ExpertChoice, RecursionConfig, Relaxation
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

ROUTER = ExpertChoice(alpha=0.5)
DORA = RecursionConfig(3, router=ROUTER, relaxation=Relaxation(3, "dora", scale=0.5))


def built(recursion: RecursionConfig) -> GPTModel:
    """A model as Megatron initializes it."""
    from mor_megatron import recursion_block_spec

    config = setup.tiny_config(num_layers=8, sequence_parallel=True)
    return GPTModel(
        config,
        recursion_block_spec(config, recursion),
        vocab_size=setup.VOCAB_SIZE,
        max_sequence_length=setup.MAX_SEQUENCE_LENGTH,
        position_embedding_type="rope",
    )


def difference_of_a_new_model() -> tuple[float, float]:
    """Between logits without deltas and with new ones, and the same after one of B is not 0."""
    setup.initialize(tp=2)
    model = built(DORA)
    plain = built(RecursionConfig(3, router=ROUTER))
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".deltas." not in n})
    ids = setup.random_tokens(2, 13)
    positions = torch.arange(14).expand_as(ids)

    def difference() -> float:
        with torch.no_grad():
            return (model(ids, positions, None) - plain(ids, positions, None)).abs().max().item()

    new = difference()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("output.2.b")).add_(1.0)
    return new, difference()


def test_new_deltas_change_no_bit(pool: WorkerPool) -> None:
    for new, moved in pool.run(difference_of_a_new_model, 2):
        assert new == 0
        assert moved > 1e-3


def gradient_norm(layout: dict[str, Any], config: dict[str, Any]) -> float:
    from mor_megatron import recursion_block_spec

    setup.initialize(**layout)
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=8, **config),
        block=lambda c, vp_stage: recursion_block_spec(c, DORA, vp_stage=vp_stage),
    )
    wrapped = setup.data_parallel(chunks)
    optimizer = setup.build_optimizer(wrapped, clip_grad=1.0)
    setup.forward_backward(wrapped, setup.random_tokens(2, 14))
    outcome = optimizer.step()
    assert outcome is not None
    return outcome[1]


def test_the_norm_of_gradients_counts_each_delta_once(pool: WorkerPool) -> None:
    (expected,) = pool.run(gradient_norm, 1, layout={}, config={})
    for sequence_parallel in (False, True):
        config = {"sequence_parallel": sequence_parallel}
        for norm in pool.run(gradient_norm, 2, layout={"tp": 2}, config=config):
            assert norm == pytest.approx(expected, rel=1e-5)


def refusals() -> list[str]:
    from mor_megatron.layers import validate

    setup.initialize()
    wrong: list[tuple[dict[str, Any], Relaxation]] = [
        (
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            Relaxation(1, projections=("up",)),
        ),
        ({"gated_linear_unit": False}, Relaxation(1)),
        ({"num_query_groups": 1, "tensor_model_parallel_size": 2}, Relaxation(1)),
        ({"add_qkv_bias": True}, Relaxation(1, "dora")),
    ]
    messages = []
    for options, relaxation in wrong:
        config = setup.tiny_config(num_layers=8, **options)
        with pytest.raises(ValueError, match="cannot be used with a recursion") as error:
            validate(config, RecursionConfig(3, relaxation=relaxation))
        messages.append(str(error.value))
    return messages


def test_what_cannot_have_deltas_is_refused_with_the_way_out(pool: WorkerPool) -> None:
    (messages,) = pool.run(refusals, 1)
    ways_out = [
        "granularity='full'",
        "Leave 'gate' out of projections",
        "as many groups",
        "kind='lora'",
    ]
    assert all(way in message for way, message in zip(ways_out, messages, strict=True))
