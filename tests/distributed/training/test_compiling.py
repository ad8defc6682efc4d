"""A recursion in Megatron as one graph of torch.compile, which is compiled once."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from mor_layers import ExpertChoice, FixedDepth, RandomDepth, RecursionConfig, TokenChoice
from mor_layers.recursion import KV_POLICIES, KVPolicy
from mor_megatron import recursion_block_spec
from mor_megatron.training import compile_recursions
from tests.distributed import megatron_setup as setup
from tests.distributed.fields.trial import MLA
from tests.distributed.pool import WorkerPool
from tests.pairs import sweep

STEPS = 20
CONFIGS: dict[str, dict[str, Any]] = {
    "heads": {"qk_layernorm": True},
    "latent": MLA,
    "window": {"window_size": (4, 0), "softmax_type": "learnable", "attention_output_gate": True},
}


def losses_of(recursion: RecursionConfig, config: dict[str, Any], compiles: bool) -> Any:
    """The losses of some steps of training, and the number of graphs after each."""
    setup.initialize()
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=6, **config),
        lambda c, vp_stage: recursion_block_spec(c, recursion, vp_stage=vp_stage),
    )
    wrapped, graphs, counts = setup.data_parallel(chunks), [], []

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)  # traces, and generates no code

    if compiles:
        torch._dynamo.reset()
        names = [name for name, _ in chunks[0].named_parameters()]
        compile_recursions(wrapped, backend=backend)
        assert [name for name, _ in chunks[0].named_parameters()] == names
    optimizer, losses = setup.build_optimizer(wrapped), []
    for step in range(STEPS):
        losses.append(
            setup.train_step(wrapped, optimizer, setup.random_tokens(2, 12, seed=step), 2)
        )
        counts.append(len(graphs))
    return losses, counts


@pytest.mark.parametrize(
    ("router", "policy", "config"),
    sweep(
        [(r, p, c) for r in ("expert", "fixed") for p in KV_POLICIES for c in CONFIGS],
        [("expert", "recursive_sharing", "heads")],
    ),
)
def test_a_recursion_is_one_graph_and_trains_as_without(
    pool: WorkerPool, router: str, policy: KVPolicy, config: str
) -> None:
    settings = ExpertChoice() if router == "expert" else FixedDepth()
    recursion = RecursionConfig(2, router=settings, kv_policy=policy)
    arguments = {"recursion": recursion, "config": CONFIGS[config]}
    losses, counts = pool.run(losses_of, 1, **arguments, compiles=True)[0]
    assert counts == [1] * STEPS
    assert losses == pytest.approx(
        pool.run(losses_of, 1, **arguments, compiles=False)[0][0], abs=1e-4
    )


def refuse(recursion: RecursionConfig, config: dict[str, Any], tp: int, reason: str) -> None:
    setup.initialize(tp=tp)
    chunks = setup.tiny_gpt(
        setup.tiny_config(num_layers=6, **config), lambda c, v: recursion_block_spec(c, recursion)
    )
    with pytest.raises(ValueError, match=reason):
        compile_recursions(chunks)


@pytest.mark.parametrize(
    ("router", "config", "tp", "reason"),
    [
        (TokenChoice(), {}, 1, "TokenChoiceRouter cannot .* depends on them"),
        (RandomDepth(), {}, 1, "RandomDepthRouter cannot .* draws random numbers"),
        (FixedDepth(), {"num_moe_experts": 2}, 1, "num_moe_experts=2 cannot"),
        (FixedDepth(), {}, 2, "tensor_model_parallel_size=2 with"),
    ],
)
def test_what_is_no_single_graph_is_refused(
    pool: WorkerPool, router: Any, config: dict[str, Any], tp: int, reason: str
) -> None:
    recursion = RecursionConfig(2, router=router)
    pool.run(refuse, tp, recursion=recursion, config=config, tp=tp, reason=reason)
