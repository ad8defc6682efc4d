"""Recursions in Megatron's CUDA graphs, as far as a CPU shows: what is captured, and what is refused.

That nothing in a captured pass waits for the device is in `test_host_waits.py`, and that graphs compute
the same is a case of `make test-gpu`.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.module import MegatronModule

from mor_layers import ExpertChoice, FixedDepth, RandomDepth, RecursionConfig, TokenChoice
from mor_layers.recursion import LoopLoss
from mor_megatron import recursion_block_spec
from mor_megatron.layers import AbsorbedLayer, recursion_layers
from mor_megatron.layers.graphs import require_whole_block
from mor_megatron.layers.routing.auxiliary_loss import RouterLossScaler
from mor_megatron.layers.validation import validate
from mor_megatron.training import causal_routing, routing_reports
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool

EXPERT = RecursionConfig(3, router=ExpertChoice())


class Manager(torch.nn.Module):
    """Stands for Megatron's, which needs a GPU: runs what would be captured, and counts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        assert config.cuda_graph_impl == "local"
        self.passes = 0

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        self.passes += 1
        return super(MegatronModule, module).__call__(*args, **kwargs)


def captured(recursion: RecursionConfig) -> dict[str, Any]:
    """What is captured of a model, and what its loss is with and without."""
    setup.initialize()
    tokens, found = setup.random_tokens(4, 12), {}
    with patch.object(cuda_graphs, "CudaGraphManager", Manager):
        for impl in ("none", "local"):
            (model,) = setup.tiny_gpt(
                setup.tiny_config(num_layers=8, cuda_graph_impl=impl),
                lambda config, v: recursion_block_spec(config, recursion),
            )
            wrapped = setup.data_parallel([model])
            loss = setup.forward_backward(wrapped, tokens, 2)
            gradients = setup.gather_gradients(wrapped)
            found[impl] = loss, gradients, len(routing_reports(wrapped))
    (layer,) = recursion_layers(model)
    managers = [m for m in model.decoder.layers if hasattr(m, "cudagraph_manager")]
    own = layer.cudagraph_manager
    passes = [own.passes]
    evaluate = model.eval(), tokens[:, :-1], torch.arange(12).expand(4, -1)
    with torch.no_grad():
        evaluate[0](*evaluate[1:], None)
        with causal_routing(model.train()):
            evaluate[0](*evaluate[1:], None)
    passes.append(own.passes)
    mask = torch.ones(4, 1, 12, 12, dtype=torch.bool).triu(1)
    with pytest.raises(ValueError, match="attention_mask cannot be used with cuda_graph_impl"):
        evaluate[0](*evaluate[1:], mask)
    absorbed = [m for m in model.decoder.layers if isinstance(m, AbsorbedLayer)]
    return {
        "managers": len(managers),
        "inside": sum(isinstance(m, Manager) for m in layer.recursion.modules()),
        "absorbed": [hasattr(m, "cudagraph_manager") for m in absorbed],
        "passes": passes,
        "results": found,
    }


def test_a_recursion_is_captured_as_one_graph_in_training_only(pool: WorkerPool) -> None:
    (found,) = pool.run(captured, recursion=EXPERT)
    assert found["managers"] == 3  # prelude, recursion and coda
    assert found["inside"] == 0
    assert found["absorbed"] == [False] * 5  # 8 layers, of which 6 recur
    assert found["passes"] == [2, 2]  # two microbatches, then evaluation and causal routing
    (loss, gradients, reports), (same, alike, no_reports) = found["results"].values()
    assert loss == same
    torch.testing.assert_close(gradients, alike, rtol=0, atol=0)
    assert (reports, no_reports) == (1, 0)


@pytest.mark.parametrize(
    ("recursion", "fields", "says"),
    [
        (EXPERT, {"cuda_graph_impl": "transformer_engine"}, "Use 'local' or 'full_iteration'"),
        (RecursionConfig(3, router=TokenChoice()), {}, "with TokenChoice cannot .* varies"),
        (RecursionConfig(3, router=ExpertChoice(warmup_steps=9)), {}, "with ExpertChoice .*warmup"),
        (RecursionConfig(3, router=RandomDepth()), {}, "with RandomDepth .* generator"),
        (EXPERT, {"num_moe_experts": 4}, "with num_moe_experts=4 .* known at run time"),
        (EXPERT, {"cuda_graph_modules": ["attn"]}, "cuda_graph_modules=.'attn'. .* as a whole"),
        (EXPERT, {"context_parallel_size": 2}, "with context_parallel_size=2 .* on the host"),
        (replace(EXPERT, loop_loss=LoopLoss()), {}, "with loop_loss cannot"),
    ],
)
def test_what_a_graph_cannot_replay_is_refused_by_name(
    recursion: RecursionConfig, fields: dict[str, Any], says: str
) -> None:
    fields = {"cuda_graph_impl": "local"} | fields
    with pytest.raises(ValueError, match=says):
        validate(setup.make_config(**(setup.LLAMA_LIKE | {"num_layers": 8} | fields)), recursion)


@pytest.mark.parametrize("impl", ["local", "full_iteration"])
@pytest.mark.parametrize("router", [ExpertChoice(), FixedDepth()])
def test_fixed_capacities_are_captured(router: Any, impl: str) -> None:
    config = setup.make_config(**setup.LLAMA_LIKE | {"num_layers": 8, "cuda_graph_impl": impl})
    validate(config, RecursionConfig(3, router=router))


def test_a_part_of_a_block_is_refused() -> None:
    """Where recursion steps are pipeline stages."""
    config = setup.make_config(**setup.LLAMA_LIKE | {"cuda_graph_impl": "full_iteration"})
    with pytest.raises(ValueError, match="recursion steps as virtual stages"):
        require_whole_block(config, is_whole=False)
    require_whole_block(config, is_whole=True)
    require_whole_block(setup.make_config(**setup.LLAMA_LIKE), is_whole=False)


def test_the_loss_scale_stays_where_a_graph_reads_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(RouterLossScaler, "scale", None)
    RouterLossScaler.set_loss_scale(torch.tensor([2.0]))
    place = RouterLossScaler.scale
    given = torch.tensor(3.0)
    RouterLossScaler.set_loss_scale(given)
    assert RouterLossScaler.scale is place
    assert place is not None and place == 3
    given.fill_(5.0)
    assert place == 3
