"""A Megatron model under causal routing is the torch model under causal routing."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from mor_layers import (
    DecoderConfig,
    ExpertChoice,
    MoRTransformer,
    RecursionConfig,
    RouterConfig,
    TokenChoice,
)
from mor_megatron import causal_routing, recursion_block_spec, recursion_layers
from mor_megatron.checkpoints import load_tensors
from mor_megatron.checkpoints.weights import megatron_tensors
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

LENGTH, CHANGED = 15, 9
ROUTERS = {
    "expert_choice": ExpertChoice(threshold=0.5),
    "aux_router": ExpertChoice(predictor="aux_router", threshold=0.5),
    "token_choice": TokenChoice(),
}


def differences(router: RouterConfig, tp: int, sequence_parallel: bool) -> dict[str, Any]:
    """How far the two models are apart, and what changing late tokens does to the earlier ones."""
    setup.initialize(tp=tp)
    torch.manual_seed(0)
    recursion = RecursionConfig(3, router=router, kv_policy="recursive_sharing")
    decoder = DecoderConfig(64, 32, 64, num_unrolled_layers=5, num_heads=4, recursion=recursion)
    torch_model = MoRTransformer(decoder).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():  # apart enough for every depth to occur
            parameter.add_(0.3 * torch.randn_like(parameter))
    config = setup.tiny_config(
        num_layers=5, num_query_groups=4, sequence_parallel=sequence_parallel
    )
    config.layernorm_epsilon = decoder.rms_norm_epsilon
    model = GPTModel(
        config,
        recursion_block_spec(config, recursion),
        vocab_size=64,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=int(decoder.rope_base),
        parallel_output=False,
        share_embeddings_and_output_weights=decoder.tie_embeddings,
    ).eval()
    load_tensors([model], megatron_tensors(torch_model.state_dict(), decoder))
    ids = torch.randint(0, 64, (2, LENGTH + LENGTH % tp))
    later = ids.clone()
    later[:, CHANGED:] = (later[:, CHANGED:] + 7) % 64
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        free = model(ids, positions, None)
        with causal_routing(model):
            logits, changed = model(ids, positions, None), model(later, positions, None)
        expected = torch_model(ids, causal_routing=True)
    return {
        "torch": (logits - expected.logits).abs().max().item(),
        "later tokens": (logits - changed)[:, :CHANGED].abs().max().item(),
        "top-k": (logits - free).abs().max().item(),
        "depths": expected.depths.unique().tolist(),
        "still on": [layer.causal_routing for layer in recursion_layers(model)],
    }


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, True)])
@pytest.mark.parametrize("router", ROUTERS)
def test_causal_routing_is_the_torch_models(
    pool: WorkerPool, router: str, tp: int, sequence_parallel: bool
) -> None:
    for found in pool.run(
        differences, tp, router=ROUTERS[router], tp=tp, sequence_parallel=sequence_parallel
    ):
        assert found["torch"] < 1e-4 and found["later tokens"] < 1e-4
        assert len(found["depths"]) > 1 and found["still on"] == [False]
        if router != "token_choice":  # which is causal by itself
            assert found["top-k"] > 1e-2
